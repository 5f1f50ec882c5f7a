"""Read a JSON list entry by entry, as `json.load` would, with a small part of the file in memory.

Why not `ijson`: it does not always read what `json.load` reads, which LLaVA and the rest of this
project use. It refuses NaN and half a surrogate pair, so one odd example would cost the whole file.
It rounds whole numbers beyond 2^63, or fails on them. Its errors name no line. The parser below
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

After a mistake in the middle of a file, an entry seems to have no end. With this limit the mistake
is reported before the whole file is in memory.
"""
NUMBER_CHARACTERS = "0123456789+-.eE"
SPACE = re.compile(r"[ \t\n\r]*")


class _TextWindow:
    """The part of a text file that is in memory.

    Attributes:
        text: that part.
        position: index in `text` of the next character.
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
        """Drop what was parsed, and read on. Returns False at the end of the file."""
        # Read at least as much as is left, so that the window doubles: an entry that is longer
        # than a chunk is parsed from its start each time.
        num_left = len(self.text) - self.position
        try:
            chunk = self.file.read(max(CHUNK, num_left))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}, behind line {self.line}: not UTF-8 text") from error

        if not chunk:
            return False

        # Count lines when they leave the window. Errors name a line of the file.
        self.line += self.text.count("\n", 0, self.position)
        self.text = self.text[self.position :] + chunk
        self.position = 0
        return True

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end of the file."""
        while True:
            space = SPACE.match(self.text, self.position)
            assert space is not None  # the pattern also matches the empty string
            self.position = space.end()

            # White space may go on behind the window.
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
                # The entry is wrong, or the window ends in it. Only more text can tell.
                if is_too_long or not self.read_more():
                    self.fail(error)
                continue
            except (ValueError, RecursionError) as error:
                # A number has thousands of digits, or lists are nested a thousand deep.
                self.fail_here(str(error))

            # A number at the end of the window may go on behind it. There the slice is "", which
            # is in every string.
            may_go_on = self.text[end : end + 1] in NUMBER_CHARACTERS
            if is_too_long or not may_go_on or not self.read_more():
                self.position = end
                return value

    def fail_here(self, message: str) -> NoReturn:
        """Raise UserError for the next character."""
        self.fail(JSONDecodeError(message, self.text, self.position))

    def fail(self, error: JSONDecodeError) -> NoReturn:
        """Raise UserError with the error's line in the file."""
        # The error counts lines from the start of the window.
        line = self.line + error.lineno - 1
        raise UserError(
            f"{self.path}, line {line}, column {error.colno}: not valid JSON: {error.msg}"
        ) from error


def read_list(file: TextIO, path: Path) -> Iterator[Any]:
    """Yield the entries of the list that a file holds.

    Raises UserError, with line and column, if it is not valid JSON.
    """
    # An empty list has no entry between its brackets.
    window = _TextWindow(file, path)
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        yield window.take_entry()
        while window.take(",]") == ",":
            # The decoder does not skip white space itself.
            window.peek()
            yield window.take_entry()

    # A second list behind the first would be lost without a word.
    rest = window.peek()
    if rest:
        window.fail_here(f"found {rest!r} behind the list")
