"""Where bytes that are not in git live, and how a file is written whole."""

import json
import os
from pathlib import Path
from typing import Any


def data_dir() -> Path:
    """`$VZIP_DATA`, else `vzip` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if path := os.environ.get("VZIP_DATA"):
        return Path(path).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vzip"


def write_json(path: Path, content: Any) -> None:
    """Write a file beside its place and move it there, so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2))
    temporary.replace(path)
