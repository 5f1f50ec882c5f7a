"""Family adapters: one file each, found on disk by the `model_type` that it names."""

import importlib
import pkgutil
from functools import cache
from typing import Any

from vzip.errors import UserError
from vzip.families.base import Family

__all__ = ["Family", "families", "family_of"]


@cache
def families() -> dict[str, type[Family]]:
    """The families on disk, by `model_type`."""
    found: dict[str, type[Family]] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Family) and value is not Family:
                found[value.model_type] = value
    return found


def family_of(model: Any) -> Family:
    """The adapter around a model. Raises UserError for a model of another family."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in families():
        raise UserError(f"a model of type {kind!r} is not supported; supported are: {', '.join(sorted(families()))}")
    return families()[kind](model)
