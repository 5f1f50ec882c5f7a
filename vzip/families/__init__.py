"""Family adapters: one file each, found on disk by the `model_type` that it names."""

import importlib
import pkgutil
from functools import cache
from typing import Any

from vzip.checkpoints.shards import read_config
from vzip.errors import UserError
from vzip.families.base import Family

__all__ = ["Family", "families", "family_at", "family_of"]


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
    """The adapter around a model, by its nearest class. Raises UserError for a model of another family."""
    by_class = {family.model_class: family for family in families().values()}
    for cls in type(model).__mro__:
        if cls in by_class:
            return by_class[cls](model)
    supported = ", ".join(sorted(family.model_class.__name__ for family in families().values()))
    raise UserError(f"a model of class {type(model).__name__} is not supported; supported are: {supported}")


def family_at(path: str) -> type[Family]:
    """The family of the model in a folder or at a hub id, also in the layout of a model's own code.

    Raises:
        OSError: there is neither, or it has no config.json.
        UserError: a model of another kind.
    """
    config = read_config(path)
    for family in families().values():
        if family.original is not None and family.original.is_original(config):
            return family
    if (kind := config.get("model_type")) not in families():
        raise UserError(
            f"{path} holds a model of type {kind!r}; supported are: {', '.join(sorted(families()))}"
        )
    return families()[kind]
