"""Where files outside git live, and how a file is written whole or not at all.

Many commands start with this module, so it imports nothing but the standard library.
"""

import errno
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

SCRATCH = re.compile(r"\.(\d+)-\d+\.vzip-tmp")
"""What the name of a scratch file ends with: the process and the thread that write it."""
MAX_PREFIX = 50
"""Characters of the target's name in a scratch file's name, which must fit the file system too."""


def data_dir() -> Path:
    """`$VZIP_DATA`, else `vzip` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if path := os.environ.get("VZIP_DATA"):
        return Path(path).expanduser().absolute()

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vzip"


def _is_other_process(pid: int) -> bool:
    """Whether a process with this number runs, and is not this one."""
    # A container's processes have the same few numbers each time, so a file with this
    # process's own number was left by an earlier one.
    if pid == os.getpid():
        return False

    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # it runs, and belongs to another user
    return True


def delete_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete scratch files in a folder whose processes were killed.

    Args:
        folder: where `atomic_write` wrote.
        name: delete only those of the target with this name; by default those of all targets.
    """
    prefix = "" if name is None else name[:MAX_PREFIX]
    for file in folder.glob(f"{escape(prefix)}*.vzip-tmp"):
        # "a.json" is the beginning of "a.json.gz" too.
        scratch = SCRATCH.search(file.name)
        if scratch is None or (name is not None and scratch.start() != len(prefix)):
            continue
        if not _is_other_process(int(scratch[1])):
            file.unlink(missing_ok=True)


@contextmanager
def atomic_write(target: Path, *, clean: bool = True) -> Iterator[Path]:
    """Yield a scratch path to write to; the `with` block's end moves it to `target`.

    Whenever the process is killed, `target` is the old file or the whole new one. After an error it
    is the old one.

    Args:
        target: the file to write.
        clean: first delete what killed processes left of the same target. Turn it off to write very
            many files into one folder, after one call of `delete_leftovers`: each cleaning reads
            the whole folder.
    """
    if clean:
        delete_leftovers(target.parent, target.name)

    # Processes and threads that write the same file each have a scratch file of their own.
    suffix = f".{os.getpid()}-{threading.get_ident()}.vzip-tmp"
    scratch = target.with_name(f"{target.name[:MAX_PREFIX]}{suffix}")
    try:
        yield scratch
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2))
