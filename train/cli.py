"""What all commands share: errors without a traceback, and the types of arguments.

This module imports neither torch nor Hydra, so that commands without them start at once.
"""

import argparse
import errno
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

from vzip.errors import UserError

P = ParamSpec("P")

# Numbers of the errors for a full disk, and for a user's quota that is used up.
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, the same as in shells."""


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether the GPU's memory ran out. Only a loaded torch can have raised that error."""
    # Without an import: a command that has not loaded torch must not wait for it here.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _explain(error: BaseException) -> str | None:
    """Return the message for an error that the user can fix; None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command goes on from there"
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        return f"the disk is full ({error}); free some space and run the same command again: it resumes"
    if isinstance(error, Exception) and _is_out_of_memory(error):
        reason = str(error).splitlines()[0]
        return (
            f"the GPU's memory ran out ({reason}); make batch.tokens smaller, or evaluate.batch if it "
            f"happened while questions were answered"
        )
    return None


def exit_on_user_error(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command print an error that the user can fix without a traceback, and exit.

    The exit code is 2, or 130 after Ctrl-C. All other errors pass through.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        # Ctrl-C is no Exception in Python, so it is named.
        try:
            command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            message = _explain(error)
            if message is None:
                raise
            code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2
        else:
            return

        # Rank 0 prints the same message. The others wait, so that the launcher ends them first.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)

        # `os._exit` below would lose what is not yet written.
        sys.stdout.flush()
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
