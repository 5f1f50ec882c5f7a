"""Check what the JSON files of a run hold, before it is used. Anybody may have written them.

This module needs the standard library alone, because commands without torch read runs too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vzip.errors import UserError

ARCHITECTURE = "VZipForConditionalGeneration"
"""The architecture that `config.json` of an export names for vLLM, whose plugin serves it."""

LARGEST = 10**15
"""Whole numbers of a run are smaller. A damaged file may hold one of thousands of digits."""


@dataclass(frozen=True)
class Kind:
    """A kind of value in a JSON file."""

    name: str
    """How a message calls such a value, e.g. "a text"."""
    accepts: Callable[[Any], bool]
    """Whether a value is of this kind."""

    def or_null(self) -> "Kind":
        """Return the kind that also accepts null."""
        return Kind(f"{self.name} or null", lambda value: value is None or self.accepts(value))


# isinstance() would take true and false for numbers, so types are compared.


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_whole(value)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_object_of_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(each) for each in value.values())


def _is_object_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _is_object_of_objects(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number", _is_whole)
COUNT = Kind("a whole number, at least 1", lambda value: _is_whole(value) and value >= 1)
NUMBER = Kind("a number", _is_number)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
TEXTS = Kind("a list of texts", _is_list_of_texts)
NUMBERS = Kind("an object of numbers", _is_object_of_numbers)
OBJECTS = Kind("an object of objects", _is_object_of_objects)
NAMED_TEXTS = Kind("an object of texts", _is_object_of_texts)

_MISSING = object()


def _entry(content: Any, name: str) -> Any:
    """Return an entry, such as "base.id", or `_MISSING`."""
    # A broken file may hold a text or a number where an object is expected.
    for key in name.split("."):
        if not isinstance(content, dict) or key not in content:
            return _MISSING
        content = content[key]
    return content


def _shown(value: Any) -> str:
    """Describe a value in a few letters."""
    # A list or an object may be large, or nested deeper than Python can print.
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    text = "a number of many digits" if type(value) is int and not _is_whole(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_entries(
    content: Any,
    required: Mapping[str, Kind],
    *,
    source: str | Path,
    advice: str,
    optional: Mapping[str, Kind] | None = None,
) -> None:
    """Check the entries of a JSON object. Entries that nobody names here may hold anything.

    Args:
        content: what the file holds.
        required: kinds of the entries that must be there, by name. "base.id" is an entry of an
            entry.
        source: the file, for the message.
        advice: what the user can do, to end the message with.
        optional: kinds of the entries that may be missing.

    Raises:
        UserError: an entry is missing or of another kind.
    """
    missing = [name for name in required if _entry(content, name) is _MISSING]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}, which every run writes; {advice}")

    for name, kind in {**required, **(optional or {})}.items():
        value = _entry(content, name)
        if value is not _MISSING and not kind.accepts(value):
            raise UserError(f"{source}: {name} is {_shown(value)}, not {kind.name}; {advice}")
