"""Where files outside git live.

Many commands start with this module, so it imports nothing but the standard library.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""


def data_dir() -> Path:
    """Return `$VZIP_DATA`, or else `vzip` in the user's cache (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if path := os.environ.get("VZIP_DATA"):
        # Absolute, because a run's settings record it, and a later command may start elsewhere.
        return Path(path).expanduser().absolute()

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vzip"
