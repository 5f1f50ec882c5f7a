"""Read a JSON list entry by entry, as `json.load` would, with a small part of the file in memory."""

import json
import re
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from vzip import UserError

CHUNK = 2**20
"""Characters that are read at once."""
MAX_ENTRY = 2**26
"""Characters of an entry: a mistake in the middle of a file is found within as many, not at its end."""
_OF_NUMBERS = "0123456789+-.eE"
_SPACE = re.compile(r"[ \t\n\r]*")


class _TextWindow:
    """The part of a text file that is being looked at; `at` is where the reader stands in it."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path, self.decoder = file, path, json.JSONDecoder()
        self.text, self.at, self.line = "", 0, 1

    def more(self) -> bool:
        """Move on and read some more; False at the end of the file."""
        try:
            chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}, behind line {self.line}: not UTF-8 text") from error
        if chunk:
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)

    def mark(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self, allowed: str) -> str:
        """Step over the next character, which must be one of these."""
        found = self.mark()
        if not found or found not in allowed:
            self.refuse(
                JSONDecodeError(
                    f"expected {' or '.join(allowed)}, found {found or 'the end'!r}", self.text, self.at
                )
            )
        self.at += 1
        return found

    def entry(self) -> Any:
        """The next value."""
        while True:
            last = len(self.text) - self.at > MAX_ENTRY
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except JSONDecodeError as error:
                if last or not self.more():
                    self.refuse(error)
            except (
                ValueError,
                RecursionError,
            ) as error:  # of numbers of thousands of digits; of lists in lists in lists
                self.refuse(JSONDecodeError(str(error), self.text, self.at))
            else:
                cut = self.text[end : end + 1] in _OF_NUMBERS  # "": the window ends here
                if not cut or last or not self.more():
                    self.at = end
                    return value

    def refuse(self, error: JSONDecodeError) -> None:
        line = self.line + error.lineno - 1
        raise UserError(
            f"{self.path}, line {line}, column {error.colno}: not valid JSON: {error.msg}"
        ) from error


def read_list(file: TextIO, path: Path) -> Iterator[Any]:
    """The entries of the list that a file holds. Raises UserError, with line and column, where it is not valid JSON."""
    window = _TextWindow(file, path)
    window.take("[")
    if window.mark() == "]":
        window.take("]")
    else:
        yield window.entry()
        while window.take(",]") == ",":
            window.mark()
            yield window.entry()
    if rest := window.mark():
        window.refuse(JSONDecodeError(f"found {rest!r} behind the list", window.text, window.at))
