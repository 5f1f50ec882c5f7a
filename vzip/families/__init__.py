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
    """Return the families on disk, by `model_type`."""
    # A new family needs no entry in a list: its file in this folder is enough.
    by_type: dict[str, type[Family]] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for value in vars(module).values():
            # Base classes of families name no type.
            if isinstance(value, type) and issubclass(value, Family) and hasattr(value, "model_type"):
                by_type[value.model_type] = value
    return by_type


def family_of(model: Any, *, anyres: str = "released") -> Family:
    """Return the adapter around a model, chosen by the nearest class.

    Args:
        model: the conditional-generation model.
        anyres: order of the tokens of several tiles, see `vzip.families.anyres`.

    Raises:
        UserError: a model of an unsupported class, or an unknown order.
    """
    by_class = {family.model_class: family for family in families().values()}
    for cls in type(model).__mro__:
        if cls in by_class:
            return by_class[cls](model, anyres=anyres)

    supported = ", ".join(sorted(cls.__name__ for cls in by_class))
    raise UserError(f"a model of class {type(model).__name__} is not supported; supported are: {supported}")


def family_at(path: str) -> type[Family]:
    """Return the family of the model in a folder or at a hub id, in any supported layout.

    Raises:
        OSError: no such folder or hub id, or no config.json in it.
        UserError: a model of an unsupported type.
    """
    # Original layouts come first: their model_type may be that of another family.
    config = read_config(path)
    for family in families().values():
        if family.original is not None and family.original.is_original(config):
            return family

    model_type = config.get("model_type")
    if model_type not in families():
        raise UserError(
            f"{path} holds a model of type {model_type!r}; supported are: {', '.join(sorted(families()))}"
        )
    return families()[model_type]
