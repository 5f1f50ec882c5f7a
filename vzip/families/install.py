"""Put a family's computation in the place of methods of one model instance."""

import functools
import inspect
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vzip.errors import UserError
from vzip.media import EXTRA_NAMES, PIXEL_NAMES, MediaInputs
from vzip.reducers.base import Reducer


def check_not_attached(family: Any) -> None:
    """Raise UserError if one of the methods is replaced already."""
    if set(family.patched_methods) & set(vars(family.model.model)):
        raise UserError("a reducer is attached to this model already; call detach() on its handle first")


def replace_method(family: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Hide a method of the inner module's class by a function, on this instance alone."""
    inner = family.model.model
    setattr(inner, name, types.MethodType(replacement, inner))


def features_method(family: Any, name: str, kind: str, reducer: Reducer) -> Callable[..., Any]:
    """Make a method of `project(visual_features(...))` with the signature that `generate` reads."""
    method = getattr(type(family.model.model), name)
    signature = inspect.signature(method)
    family_class = type(family)
    anyres = family.anyres

    @functools.wraps(method)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        # All arguments by name, including those that `method` takes as **kwargs.
        arguments = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        del arguments["self"]
        more_arguments = arguments.pop("kwargs", {})
        arguments |= more_arguments

        # Pixels and sizes are inputs; everything else is an option of the tower.
        inputs = MediaInputs.from_processed(kind, arguments)
        options = {}
        for argument, value in arguments.items():
            if argument not in PIXEL_NAMES[kind] and argument not in EXTRA_NAMES[kind]:
                options[argument] = value

        # `self` is the inner module, or its copy in a deep copy of the model. So a new adapter is
        # made around it: `family` still holds the first model.
        adapter = family_class(SimpleNamespace(config=self.config, model=self), anyres=anyres)
        return adapter.model_output(kind, adapter.features_for_model(kind, inputs, reducer, **options))

    return patched
