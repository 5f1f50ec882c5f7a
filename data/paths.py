"""Where bytes that are not in git live, and how a file is written whole."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""


def data_dir() -> Path:
    """`$VZIP_DATA`, else `vzip` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if path := os.environ.get("VZIP_DATA"):
        return Path(path).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vzip"


def is_other_process(pid: int) -> bool:
    """Whether there is such a process, and it is not this one: a container's processes have the same few numbers each time."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's
    return pid != os.getpid()


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, which is moved there at the end: any kill leaves the old file or the new one.

    What processes that were killed have left is deleted.
    """
    for old in target.parent.glob(f"{escape(target.name)}.*.tmp"):
        pid = old.name.split(".")[-2]
        if pid.isdigit() and not is_other_process(int(pid)):
            old.unlink(missing_ok=True)
    scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2))
