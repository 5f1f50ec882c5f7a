"""Replace the forwards of some modules for a while. Their classes, and so other models, never change."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give each module another `forward` while the block runs.

    The modules' hooks still run, because parameter sharding (ZeRO 3) keeps its books in hooks.
    """
    # A module may have a `forward` of its own already; otherwise it uses that of its class.
    own_forwards = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own_forward in own_forwards.items():
            if own_forward is None:
                del module.forward
            else:
                module.forward = own_forward
