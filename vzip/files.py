"""Write files whole or not at all, and read JSON files that may be damaged.

Many commands start with this module, so it imports nothing but the standard library.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from vzip.errors import UserError

SCRATCH = re.compile(r"\.(?P<machine>[A-Za-z0-9_]+-\d+)-(?P<pid>\d+)-[0-9a-f]+\.vzip-tmp$")
"""End of a scratch file's name: the machine and the process that write it, and a random number."""

MAX_PREFIX = 40
"""A scratch file's name starts with so many characters of the target's name.

File systems limit the length of a name, and the target's name may use all of it.
"""

OLD_SECONDS = 7 * 24 * 3600
"""Age at which the scratch file of another machine counts as left behind."""


def machine_name() -> str:
    """Name this machine, or container, for the names of files: "host-namespace".

    Containers on one host may share the host's name, but not the numbers of its processes. So the
    name includes the namespace that these numbers belong to.
    """
    host = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())[:20] or "host"
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0  # systems without /proc have no such containers
    return f"{host}-{namespace}"


def is_running(pid: int) -> bool:
    """Tell whether a process of this machine is running."""
    # Signal 0 ends nothing: it only asks whether the process exists.
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # it runs, and belongs to another user
    return True


def _is_left_behind(file: Path, scratch: re.Match[str]) -> bool:
    """Tell whether nobody writes this scratch file any more."""
    # This machine knows its own processes.
    if scratch["machine"] == machine_name():
        return not is_running(int(scratch["pid"]))

    # Of another machine's processes it knows nothing, so only age tells.
    try:
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return False  # its owner has just moved it
    return age > OLD_SECONDS


def delete_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete scratch files in a folder whose processes were killed.

    Files that another machine writes are deleted only when they are a week old.

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
        if _is_left_behind(file, scratch):
            file.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems can't do this for a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def atomic_write(target: Path, *, clean: bool = True) -> Iterator[Path]:
    """Yield a scratch path to write to. The end of the `with` block moves it to `target`.

    If the process is killed, or the power fails, `target` is the old file or the whole new one.
    After an error it is the old one.

    Args:
        target: the file to write.
        clean: first delete the scratch files of the same target that killed processes left. Each
            cleaning reads the whole folder. To write very many files into one folder, turn it off
            and call `delete_leftovers` once.
    """
    if clean:
        delete_leftovers(target.parent, target.name)

    # Everyone who writes the same file, on whatever machine, has a scratch file of their own.
    suffix = f".{machine_name()}-{os.getpid()}-{secrets.token_hex(4)}.vzip-tmp"
    scratch = target.with_name(f"{target.name[:MAX_PREFIX]}{suffix}")
    try:
        yield scratch
        # The content must be on the disk before the name is, or a power cut leaves an empty file.
        sync(scratch)
        # A rename is atomic: readers see the old file or the new one, and nothing between.
        scratch.replace(target)
        sync(target.parent)
    finally:
        # After an error, the half-written file is still there.
        scratch.unlink(missing_ok=True)


def check_is_file(path: Path) -> None:
    """Raise ValueError for a folder, a pipe, a socket or a device, and OSError for a missing file.

    Opening a pipe waits for ever, and some devices can be read without end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file, but a folder, a pipe or a device")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2))


def read_json(path: Path, *, advice: str) -> Any:
    """Read a JSON file that somebody else may have written or damaged.

    Args:
        path: the file.
        advice: what the user can do if it is damaged, to end the message with.

    Raises:
        UserError: the file can't be read, or holds no JSON.
    """
    try:
        check_is_file(path)
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        # ValueError covers pipes, bytes that are no text and text that is no JSON. RecursionError
        # comes from values nested thousands of levels deep.
        raise UserError(f"{path} is damaged or can't be read ({error}); {advice}") from error


def read_json_object(path: Path, *, advice: str) -> dict[str, Any]:
    """Read a JSON file that must hold an object, with the arguments and errors of `read_json`."""
    content = read_json(path, advice=advice)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object); {advice}")
    return content


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
