"""An index of the checked pictures and videos of a subset, in a file that only grows."""

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.fetch.sources import Source


@dataclass(frozen=True)
class Checked:
    """A picture or video that was looked at: a line of the media index.

    Attributes:
        path: path below the image folder.
        bytes: size of the file, or of all frames in a folder. -1 for a missing file.
        height, width: size of the upright picture in pixels. 0 for videos.
        digest: start of the sha256 of a picture's file.
        fault: why it can't be used. Empty if it can.
        final: True if asking the same sources again would not help.
        tried: the sources that did not help.
    """

    path: str
    bytes: int
    height: int = 0
    width: int = 0
    digest: str = ""
    fault: str = ""
    final: bool = True
    tried: tuple[str, ...] = ()


def media_bytes(path: Path) -> int:
    """Return the size of a picture or video as in `Checked.bytes`.

    Raises OSError and ValueError for paths that no file can have.
    """
    try:
        if path.is_dir():
            # A video in frames, one file each.
            return sum(frame.stat().st_size for frame in path.iterdir())
        return path.stat().st_size
    except FileNotFoundError:
        return -1


class MediaIndex:
    """Entries for pictures and videos, one JSON object a line in a file.

    Threads may share an index. A later line replaces an earlier one of the same path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._entries: dict[str, Checked] = {}
        self._ends_in_newline = True
        if path.is_file():
            self._read()

    def _read(self) -> None:
        # A kill may have cut the last line, even in the middle of a character.
        content = self.path.read_text(encoding="utf-8", errors="replace")
        self._ends_in_newline = not content or content.endswith("\n")
        for line in content.split("\n"):
            try:
                entry = json.loads(line)
                tried = tuple(entry.get("tried", ()))
                self._entries[entry["path"]] = Checked(**entry | {"tried": tried})
            except (AttributeError, KeyError, TypeError, ValueError):
                # A kill has cut this line. Its file is looked at again.
                continue

    def record(self, entry: Checked) -> None:
        """Record an entry. It is in the file when this returns."""
        # Leave out the fields that say nothing: a good file has no fault, a bad one no size.
        unused = ("digest", "height", "width") if entry.fault else ("fault", "final", "tried")
        values = {key: value for key, value in asdict(entry).items() if key not in unused}
        line = json.dumps(values) + "\n"
        # End a line that a kill has cut short, or the new one would be lost with it.
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line if self._ends_in_newline else f"\n{line}")
            self._ends_in_newline = True
            self._entries[entry.path] = entry

    def lookup(self, path: str, folder: Path, sources: Sequence[Source]) -> Checked | None:
        """Return the entry of a path, or None if the path must be looked at (again).

        It must be if its file has another size now, or if its fault may have passed: there is a new
        source, or one of the old sources did not answer.
        """
        entry = self._entries.get(path)
        if entry is None:
            return None

        if entry.fault:
            names = {str(source) for source in sources}
            if not entry.final or not names <= set(entry.tried):
                return None

        # The size shows most changes, without reading the file.
        try:
            num_bytes = media_bytes(folder / path)
        except (OSError, ValueError):
            num_bytes = -1
        return entry if num_bytes == entry.bytes else None

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return (height, width) of each good picture, upright, by its path."""
        sizes = {}
        for path, entry in self._entries.items():
            if entry.height:
                sizes[path] = (entry.height, entry.width)
        return sizes

    def content(self, paths: Iterable[str]) -> str:
        """Hash the content of the pictures, and the sizes of the videos."""
        # Sorted, so that the hash does not depend on the order in which the files came.
        known: list[tuple[str, Any, str]] = []
        for path in sorted(set(paths)):
            entry = self._entries[path]
            known.append((path, entry.bytes, entry.digest))
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()
