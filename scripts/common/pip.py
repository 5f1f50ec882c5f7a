"""Look for pip, which not every environment has."""

import sys
from importlib.machinery import PathFinder

from vzip.errors import UserError


def check_pip(purpose: str) -> None:
    """Raise UserError if this Python has no pip, as in environments that uv makes.

    Args:
        purpose: what needs it, to begin the message with.
    """
    # Not by importlib.util.find_spec: a hook of setuptools takes that for the start of pip, and
    # breaks torch.compile in the same process.
    if PathFinder.find_spec("pip") is None:
        raise UserError(
            f"{purpose} needs pip, which {sys.executable} does not have; add it with "
            f"`{sys.executable} -m ensurepip` (or `uv pip install pip`), and run the same command again"
        )
