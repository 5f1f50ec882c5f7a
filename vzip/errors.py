"""The one exception that a user's mistake raises, and the plainest reasons for it."""

import importlib.util
from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """A mistake that its user can mend: the message names the setting, its value, what is allowed and what to do.

    Commands print it without a traceback and exit with code 2; the library raises it before any work is spent.
    """


def check_choice(setting: str, value: object, allowed: Sequence[object]) -> None:
    """Raises UserError, naming the setting, for a value that does not exist."""
    if value not in allowed:
        raise UserError(f"{setting}={value!r} does not exist; choose one of: {', '.join(map(str, allowed))}")


def check_count(setting: str, value: Any, least: int) -> None:
    """Raises UserError for anything but a whole number, at least `least`."""
    if type(value) is not int or value < least:
        raise UserError(f"{setting}={value} must be a whole number, at least {least}")


def check_package(package: str, *, extra: str, purpose: str) -> None:
    """Raise UserError, naming the extra of vzip to install, unless an optional package is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{purpose} needs the package {package}, which is not installed: pip install 'vzip[{extra}]'"
        )
