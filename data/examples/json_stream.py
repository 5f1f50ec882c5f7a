"""Read a JSON list entry by entry, as `json.load` would, with a small part of the file in memory.

Why not `ijson`: it reads other values than `json.load`, which the rest of this project and LLaVA
itself use. It refuses NaN and half a surrogate pair, so one odd example would cost the whole file;
it fails on, or rounds, whole numbers beyond 2^63; and its errors name no line. The parser below
only finds where an entry ends, and leaves the rest to `json`.
"""

import json
import re
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn, TextIO

from vzip import UserError

CHUNK = 2**20
"""Characters that are read at once."""
MAX_ENTRY = 2**26
"""Longest entry, in characters.

A mistake in the middle of a file is found this soon, and not at the file's end.
"""
NUMBER_CHARACTERS = "0123456789+-.eE"
SPACE = re.compile(r"[ \t\n\r]*")


class _TextWindow:
    """The part of a text file that is in memory.

    Attributes:
        text: that part.
        position: where the reader stands in `text`.
        line: number of the line in the file that `text` starts in.
    """

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.decoder = json.JSONDecoder()
        self.text = ""
        self.position = 0
        self.line = 1

    def read_more(self) -> bool:
        """Drop what was read, and read on. Returns False at the end of the file."""
        # As much as is left, at least: an entry that is longer than a chunk is parsed anew
        # each time, and the window must grow fast.
        num_left = len(self.text) - self.position
        try:
            chunk = self.file.read(max(CHUNK, num_left))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}, behind line {self.line}: not UTF-8 text") from error

        if not chunk:
            return False

        # Lines are counted as they leave the window, for error messages.
        self.line += self.text.count("\n", 0, self.position)
        self.text = self.text[self.position :] + chunk
        self.position = 0
        return True

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            space = SPACE.match(self.text, self.position)
            assert space is not None  # it matches no space, too
            self.position = space.end()
            if self.position < len(self.text) or not self.read_more():
                return self.text[self.position : self.position + 1]

    def take(self, allowed: str) -> str:
        """Step over the next character, which must be one of `allowed`."""
        character = self.peek()
        if not character or character not in allowed:
            expected = " or ".join(allowed)
            self.fail_here(f"expected {expected}, found {character or 'the end'!r}")

        self.position += 1
        return character

    def take_entry(self) -> Any:
        """Step over the next value, and return it."""
        while True:
            is_too_long = len(self.text) - self.position > MAX_ENTRY
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except JSONDecodeError as error:
                # The entry is wrong, or the window ends in it.
                if is_too_long or not self.read_more():
                    self.fail(error)
                continue
            except (ValueError, RecursionError) as error:
                # Numbers of thousands of digits; lists in lists in lists.
                self.fail_here(str(error))

            # A number may go on behind the window: "" is in every string.
            may_go_on = self.text[end : end + 1] in NUMBER_CHARACTERS
            if is_too_long or not may_go_on or not self.read_more():
                self.position = end
                return value

    def fail_here(self, message: str) -> NoReturn:
        self.fail(JSONDecodeError(message, self.text, self.position))

    def fail(self, error: JSONDecodeError) -> NoReturn:
        """Raise UserError with the error's line in the file."""
        line = self.line + error.lineno - 1
        raise UserError(
            f"{self.path}, line {line}, column {error.colno}: not valid JSON: {error.msg}"
        ) from error


def read_list(file: TextIO, path: Path) -> Iterator[Any]:
    """Yield the entries of the list that a file holds.

    Raises UserError, with line and column, if it is not valid JSON.
    """
    window = _TextWindow(file, path)
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        yield window.take_entry()
        while window.take(",]") == ",":
            window.peek()
            yield window.take_entry()

    rest = window.peek()
    if rest:
        window.fail_here(f"found {rest!r} behind the list")
