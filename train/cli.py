"""What all commands share: errors without a traceback, and the types of arguments.

This module imports neither torch nor Hydra, so that commands without them start at once.
"""

import argparse
import errno
import functools
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec

from data.paths import data_dir
from train.guards.signals import Stopped
from vzip.errors import UserError

P = ParamSpec("P")

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, the same as in shells."""

DISK_IS_FULL = "the disk is full ({error}); free some space and run the same command again: it resumes"

STORAGE = {
    errno.ENOSPC: DISK_IS_FULL,
    errno.EDQUOT: DISK_IS_FULL,
    errno.EFBIG: "a file may not be as large as it would be ({error}); see `ulimit -f`, or use another disk",
    errno.EROFS: "the disk is read-only ({error}); make it writable, or choose another folder",
    errno.EACCES: "this user may not open a file ({error}); change its rights, or choose another folder",
    errno.EPERM: "this user may not change a file ({error}); change its rights, or choose another folder",
    errno.ENAMETOOLONG: "a file's name is too long ({error}); choose a shorter name or folder",
    errno.ENOENT: "a file or folder is gone ({error}); if somebody deleted it, run the same command again",
    errno.EEXIST: "a file is where a folder should be ({error}); move it away, or choose another folder",
    errno.ENOTDIR: "a file is where a folder should be ({error}); move it away, or choose another folder",
    errno.EISDIR: "a folder is where a file should be ({error}); move it away, or choose another path",
    errno.ELOOP: "a link leads back to itself ({error}); remove it, or choose another path",
    errno.EIO: "the disk does not answer ({error}); check it, and run the same command again: it resumes",
    errno.ESTALE: "a network disk was mounted anew ({error}); run the same command again: it resumes",
    errno.EPIPE: "nobody reads what this command prints ({error}); run the same command again: it resumes",
    errno.EMFILE: "too many files are open ({error}); raise `ulimit -n`, or lower data.num_workers",
}
"""By number of a system error: what is wrong with the disk, and what to do."""

# How packages written in other languages name the number of a system error.
FOREIGN_NUMBER = re.compile(r"os error (\d+)")

# Words of torch's errors when it can't write a file. It does not say why.
TORCH_WRITES = ("inline_container", "PytorchStreamWriter", "enforce fail")

LITTLE_SPACE = 2**20
"""Bytes; a disk with less free space is full."""


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether the GPU's memory ran out. Only a loaded torch can have raised that error."""
    # Without an import: a command that has not loaded torch must not wait for it here.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _is_lost_rank(error: Exception) -> bool:
    """Tell whether a collective failed, mostly because another rank has ended."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return isinstance(error, torch.distributed.DistError) or "/gloo/transport/" in str(error)


def _full_folder(arguments: Iterable[Any]) -> Path | None:
    """Find a folder that a command writes to and whose disk is full."""
    folders = [Path.cwd(), Path(tempfile.gettempdir()), data_dir()]
    for argument in arguments:
        # The settings of a run know where it is written.
        runs = getattr(argument, "runs", None)
        if isinstance(runs, str):
            folders.append(Path(runs))

    for folder in folders:
        if folder.is_dir() and shutil.disk_usage(folder).free < LITTLE_SPACE:
            return folder
    return None


def _explain_storage(error: Exception, arguments: Iterable[Any]) -> str | None:
    """Return the message for an error of the disk; None for any other error."""
    if isinstance(error, OSError):
        number = error.errno
    elif foreign := FOREIGN_NUMBER.search(str(error)):
        # safetensors and tokenizers raise errors of their own.
        number = int(foreign[1])
    elif any(word in str(error) for word in TORCH_WRITES):
        folder = _full_folder(arguments)
        return DISK_IS_FULL.format(error=f"below {folder}") if folder else None
    else:
        return None

    message = STORAGE.get(number or 0)
    return message.format(error=error) if message else None


def _explain(error: BaseException, arguments: Iterable[Any]) -> str | None:
    """Return the message for an error that the user can fix; None for any other error.

    Args:
        error: the error.
        arguments: the command's own arguments.
    """
    if isinstance(error, UserError | Stopped):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command goes on from there"
    if isinstance(error, Exception) and _is_out_of_memory(error):
        reason = str(error).splitlines()[0]
        return (
            f"the GPU's memory ran out ({reason}); make batch.tokens smaller, or evaluate.batch if it "
            f"happened while questions were answered"
        )
    if isinstance(error, Exception) and _is_lost_rank(error):
        reason = str(error).splitlines()[0]
        return (
            f"a rank can't reach another one any more ({reason}); it has ended, and may have said why; "
            f"run the same command again: it resumes"
        )
    return _explain_storage(error, arguments) if isinstance(error, Exception) else None


def _exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ends with an error that the user can fix."""
    if isinstance(error, Stopped):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2


def exit_on_user_error(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command print an error that the user can fix without a traceback, and exit.

    The exit code is 2, 130 after Ctrl-C, or 128 and a signal's number. All other errors pass through.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        # Ctrl-C is no Exception in Python, so it is named.
        try:
            command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            message = _explain(error, args)
            if message is None:
                raise
            code = _exit_code(error)
            is_agreed = isinstance(error, Stopped)
        else:
            return

        # Rank 0 prints the same message. The others wait, so that the launcher ends them first. If all
        # ranks have agreed to stop, nobody needs to wait.
        if os.environ.get("RANK", "0") != "0":
            if is_agreed:
                os._exit(code)
            time.sleep(5)

        # `os._exit` below would lose what is not yet written. The terminal may be gone, though.
        with suppress(OSError):
            sys.stdout.flush()
        with suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)

        # Another rank may wait for this one in a collective, and a normal exit would hang with it.
        os._exit(code)

    return run


def count(text: str) -> int:
    """Parse an argument that is a whole number, at least 1. Raises ArgumentTypeError otherwise."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def writable(text: str) -> Path:
    """Parse an argument that names a file to write, and make its folder.

    Raises ArgumentTypeError if that fails.
    """
    # A benchmark of hours must not fail at the end because its file has no folder.
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} can't be written: {error}") from error
    return path


@contextmanager
def output(option: str, target: Path) -> Iterator[None]:
    """Make the folder of a file that an option names, and run the block that writes it.

    Raises:
        UserError: the file can't be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{option}={target} can't be written: {error}; free some space, or give another path"
        ) from error
