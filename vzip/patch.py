"""Replace the forwards of some modules for a while, on these modules alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give each module another `forward` while the block runs.

    Their classes never change, so other models with the same classes are safe. The modules' hooks
    still run, because parameter sharding (ZeRO 3) gathers the weights in hooks.
    """
    # An attribute of the instance hides the class's method. It may have been hidden before, e.g. by
    # an outer block, so remember what to put back.
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
