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
"""End of a scratch file's name: the numbers of the process and the thread that write it."""
MAX_PREFIX = 50
"""A scratch file's name starts with so many characters of the target's name.

File systems limit the length of a name, and the target's name may use all of it.
"""


def data_dir() -> Path:
    """Return `$VZIP_DATA`, or else `vzip` in the user's cache (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if path := os.environ.get("VZIP_DATA"):
        # Absolute, because a run's settings record it, and a later command may start elsewhere.
        return Path(path).expanduser().absolute()

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vzip"


def _is_other_process(pid: int) -> bool:
    """Whether another process with this number is running."""
    # A container's processes have the same few numbers each time, so a file with this
    # process's own number was left by an earlier one.
    if pid == os.getpid():
        return False

    # Signal 0 ends nothing: it only asks whether the process exists.
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # it runs, and belongs to another user
    return True


def delete_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete scratch files in a folder whose processes were killed.

    Args:
        folder: where `atomic_write` wrote.
        name: delete only those of the target with this name. By default those of all targets.
    """
    prefix = "" if name is None else name[:MAX_PREFIX]
    for file in folder.glob(f"{escape(prefix)}*.vzip-tmp"):
        # For "a.json", the pattern above also finds scratch files of "a.json.gz". Skip those.
        scratch = SCRATCH.search(file.name)
        if scratch is None or (name is not None and scratch.start() != len(prefix)):
            continue

        # A process that is still running may be writing to its file.
        if not _is_other_process(int(scratch[1])):
            file.unlink(missing_ok=True)


@contextmanager
def atomic_write(target: Path, *, clean: bool = True) -> Iterator[Path]:
    """Yield a scratch path to write to. The end of the `with` block moves it to `target`.

    If the process is killed, `target` is the old file or the whole new one. After an error it is
    the old one.

    Args:
        target: the file to write.
        clean: first delete the scratch files of the same target that killed processes left. Each
            cleaning reads the whole folder. To write very many files into one folder, turn it off
            and call `delete_leftovers` once.
    """
    if clean:
        delete_leftovers(target.parent, target.name)

    # Processes and threads that write the same file each have a scratch file of their own.
    suffix = f".{os.getpid()}-{threading.get_ident()}.vzip-tmp"
    scratch = target.with_name(f"{target.name[:MAX_PREFIX]}{suffix}")
    try:
        yield scratch
        # A rename is atomic: readers see the old file or the new one, and nothing between.
        scratch.replace(target)
    finally:
        # After an error, the half-written file is still there.
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2))
