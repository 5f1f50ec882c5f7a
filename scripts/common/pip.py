"""Look for pip, which not every environment has."""

import importlib.util
import sys

from vzip.errors import UserError


def check_pip(purpose: str) -> None:
    """Raise UserError if this Python has no pip, as in environments that uv makes.

    Args:
        purpose: what needs it, to begin the message with.
    """
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{purpose} needs pip, which {sys.executable} does not have; add it with "
            f"`{sys.executable} -m ensurepip` (or `uv pip install pip`), and run the same command again"
        )
