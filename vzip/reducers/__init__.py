"""Reducers: one file each, found on disk by the name of its module."""

import importlib
import pkgutil
from typing import Any

from vzip.errors import UserError
from vzip.reducers.base import Reducer, ReducerOutput, VisionTokens

__all__ = ["Reducer", "ReducerOutput", "VisionTokens", "create", "names", "reducer_class", "with_budget"]

SHARED = ("base", "cells", "merging", "selection")
"""Modules that hold no reducer, but what several of them share."""


def names() -> list[str]:
    """Return the names of the reducers on disk, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def reducer_class(name: str) -> type[Reducer]:
    """Return the class of a reducer. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"reducer={name!r} is unknown; there are: {', '.join(names())}")

    # A module holds one reducer, whose `name` is the module's.
    module = importlib.import_module(f"{__name__}.{name}")
    (cls,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and getattr(value, "name", "") == name
    ]
    return cls


def create(name: str, settings: dict[str, Any]) -> Reducer:
    """Make the reducer that `Reducer.name` and `Reducer.settings()` describe.

    Raises:
        UserError: an unknown name or setting.
    """
    try:
        reducer = reducer_class(name)(**settings)
    except TypeError as error:
        raise UserError(f"reducer {name!r} can't be made with {settings}: {error}") from error
    return reducer


def with_budget(reducer: Reducer, budget: int, *, tiles: int) -> Reducer:
    """Make the same reducer with another budget, which counts the tokens of `tiles` tiles.

    Raises:
        UserError: a reducer that has no budget, or a budget that does not divide among the tiles.
    """
    # The old counts belong to the old budget; all other settings stay.
    settings = {"budget": budget, "tiles": tiles}
    for name, value in reducer.settings().items():
        if name not in ("budget", "dominant", "contextual", "keep"):
            settings[name] = value
    return create(reducer.name, settings)
