"""VisionZip for LLaVA-type models of `transformers`: attach a reducer, load a tuned projector.

A name is imported when it is first used, because torch and transformers take seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vzip.errors import UserError

if TYPE_CHECKING:
    from vzip.handle import Handle, attach
    from vzip.runs.compare import Comparison, load
    from vzip.runs.projector import load_projector

__version__ = "0.1.0"
__all__ = ["Comparison", "Handle", "UserError", "__version__", "attach", "load", "load_projector"]

# The module of each name that is imported late. No name may be that of a module in `vzip`, because
# importing that module would overwrite the name.
_HOMES = {
    "Comparison": "vzip.runs.compare",
    "Handle": "vzip.handle",
    "attach": "vzip.handle",
    "load": "vzip.runs.compare",
    "load_projector": "vzip.runs.projector",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    # Once the name is among the module's own, Python does not call this function again.
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
