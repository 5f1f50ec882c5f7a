"""The one exception for mistakes that a user can fix, and the most common checks."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from vzip.redact import redacted


class UserError(ValueError):
    """An error that the user can fix.

    The message names the setting, its value, what is allowed, and what to do. Commands print it
    without a traceback and exit with code 2. The library raises it before any work is done.

    Secrets in addresses are taken out of the message: it may end in a log that others read.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


def check_choice(setting: str, value: object, allowed: Sequence[object]) -> None:
    """Raise UserError unless the value is one of those allowed."""
    if value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed)
        raise UserError(f"{setting}={value!r} does not exist; choose one of: {choices}")


def check_count(setting: str, value: Any, least: int) -> None:
    """Raise UserError unless the value is a whole number, at least `least`."""
    # isinstance() would take True and False for numbers.
    if type(value) is not int or value < least:
        raise UserError(f"{setting}={value} must be a whole number, at least {least}")


def check_number(setting: str, value: Any, *, least: float, most: float | None = None) -> None:
    """Raise UserError unless the value is a finite number from `least` to `most`."""
    limits = f"at least {least:g}" if most is None else f"from {least:g} to {most:g}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < least or (most is not None and value > most):
        raise UserError(f"{setting}={value} must be a number, {limits}")


def check_package(package: str, *, extra: str, purpose: str) -> None:
    """Raise UserError if an optional package is missing; the message names vzip's extra for it."""
    # Looking for the package is enough: importing it may take seconds.
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{purpose} needs the package {package}, which is not installed: pip install 'vzip[{extra}]'"
        )
