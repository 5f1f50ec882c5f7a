"""Reducers: one file each, found on disk by the name of its module."""

import importlib
import pkgutil
from typing import Any

from vzip.errors import UserError
from vzip.reducers.base import Reducer, ReducerOutput, VisionTokens

__all__ = ["Reducer", "ReducerOutput", "VisionTokens", "create", "names", "with_budget"]


def names() -> list[str]:
    """Names of the reducers on disk, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def create(name: str, settings: dict[str, Any]) -> Reducer:
    """The reducer that `Reducer.name` and `Reducer.settings()` describe. Raises UserError for an unknown name or setting."""
    if name not in names():
        raise UserError(f"reducer={name!r} is unknown; there are: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (cls,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and getattr(value, "name", "") == name
    )
    try:
        reducer: Reducer = cls(**settings)
    except TypeError as error:
        raise UserError(f"reducer {name!r} can't be made with {settings}: {error}") from error
    return reducer


def with_budget(reducer: Reducer, budget: int, *, tiles: int) -> Reducer:
    """The same reducer with another budget, the total of `tiles` tiles. Raises UserError for one that has no budget."""
    settings = {
        key: value for key, value in reducer.settings().items() if key not in ("dominant", "contextual")
    }
    return create(reducer.name, settings | {"budget": budget, "tiles": tiles})
