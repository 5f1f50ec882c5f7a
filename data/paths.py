"""Where bytes that are not in git live."""

import os
from pathlib import Path


def data_dir() -> Path:
    """`$VZIP_DATA`, else `vzip` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if path := os.environ.get("VZIP_DATA"):
        return Path(path).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vzip"
