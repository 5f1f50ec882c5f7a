"""Make virtual environments beside `.venv`, for tools that need other packages than the recipe."""

import hashlib
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from data.locks import locked
from scripts.common.pip import check_pip
from vzip import UserError

STAMP_FILE = "made-of"
"""File with a hash of everything that the environment depends on.

It is written last, so an unfinished environment has none.
"""


def make_environment(
    folder: Path, *, holds: str, ingredients: Sequence[str], fill: Callable[[Path], None]
) -> Path:
    """Return the Python of an environment. Make the environment first if it is missing or outdated.

    Args:
        folder: the environment.
        holds: what it is for, to tell the user.
        ingredients: everything that the environment depends on. If it changes, all is made again.
        fill: installs the packages, given the environment's Python.

    Raises:
        UserError: pip can't install the packages.
    """
    python = folder / "bin" / "python"
    stamp_file = folder / STAMP_FILE
    stamp = hashlib.sha256("\n".join([*ingredients, sys.version]).encode()).hexdigest()

    # If two commands start together, one makes the environment and the other waits. The lock lies
    # beside it, because nobody may be able to write into the running Python's own environment.
    with locked(folder.with_name(f"{folder.name}.lock"), wait=True):
        if stamp_file.is_file() and stamp_file.read_text() == stamp:
            return python

        # Start from an empty folder: it may hold half an environment, or one of another Python.
        print(f"making {folder.name}, once: {holds}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=False, symlinks=True)
        fill(python)
        stamp_file.write_text(stamp)

    return python


def run_pip(python: Path, *arguments: str, package: str) -> None:
    """Run this Python's pip on another environment.

    Args:
        python: the environment's Python.
        arguments: pip's own arguments.
        package: what is installed, for the message.

    Raises:
        UserError: pip fails, or this Python has no pip.
    """
    check_pip(f"installing {package}")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    process = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=False)
    if process.returncode:
        raise UserError(
            f"pip can't install {package}; connect to a package index, and run the same command again. "
            f"The end of its output:\n{process.stderr[-2000:]}"
        )
