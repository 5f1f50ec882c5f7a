"""Bring the pictures and videos of a subset into its folder, each looked at once, and remember what was found.

Nothing is written that was not decoded before, and no file is ever half there; a command that was killed goes on where it was.
"""

import errno
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

from data.fetch.http import NotFoundError, TransientError
from data.fetch.sources import Source
from data.paths import is_other_process
from data.progress import progress
from vzip import UserError
from vzip.pictures import open_picture
from vzip.videos import check_video

MAX_FAILURES = 50
"""Of one source: so many at the start, or servers that don't answer so often in a row, end the command."""
NUM_READS = 2
"""What comes damaged from a place is asked for once more."""
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
OF_THE_PATH = {
    errno.EEXIST,
    errno.EILSEQ,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
}
"""Errors that no later attempt is spared."""
LEFTOVER = re.compile(r"\.(\d+)-\d+\.vzip-part")

Medium = tuple[str, str, str]  # (kind, path below the folder, source)


@dataclass(frozen=True)
class Fault:
    """Why a picture or video can't be used."""

    reason: str
    final: bool
    """Whether asking the same places again would not help."""


@dataclass(frozen=True)
class Checked:
    """A picture or video that was looked at: a line of the ledger."""

    path: str
    bytes: int
    """Of the file: -1 where there is none, 0 for a folder of frames."""
    height: int = 0
    """Of an upright picture, in pixels; videos have none."""
    width: int = 0
    digest: str = ""
    """sha256 of a picture's file, shortened."""
    fault: str = ""
    final: bool = True
    tried: tuple[str, ...] = ()
    """Places that did not help."""


def _num_bytes(path: Path) -> int:
    """As in `Checked`. Raises OSError and ValueError for paths that no file can have."""
    try:
        return 0 if path.is_dir() else path.stat().st_size
    except FileNotFoundError:
        return -1


class MediaIndex:
    """What is known of pictures and videos, in a file of a JSON object a line that only grows. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._entries: dict[str, Checked] = {}
        self._whole = True
        if path.is_file():
            content = path.read_text(encoding="utf-8", errors="replace")
            self._whole = not content or content.endswith("\n")
            for line in content.split("\n"):
                with suppress(
                    AttributeError, KeyError, TypeError, ValueError
                ):  # cut by a kill: it is found out anew
                    entry = json.loads(line)
                    self._entries[entry["path"]] = Checked(**entry | {"tried": tuple(entry.get("tried", ()))})

    def record(self, entry: Checked) -> None:
        """Remember an entry, for ever once this returns."""
        left_out = ("fault", "final", "tried") if not entry.fault else ("digest", "height", "width")
        line = json.dumps({key: value for key, value in asdict(entry).items() if key not in left_out})
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n" if self._whole else f"\n{line}\n")
            self._whole = True
            self._entries[entry.path] = entry

    def settled(self, path: str, folder: Path, places: Sequence[Source]) -> Checked | None:
        """What is known of a path, if its file is as it was, and, for a fault, no place is new and none may answer later."""
        entry = self._entries.get(path)
        if entry is None or (entry.fault and not (entry.final and {*map(str, places)} <= {*entry.tried})):
            return None
        with suppress(OSError, ValueError):
            return entry if _num_bytes(folder / path) == entry.bytes else None
        return entry if entry.bytes < 0 else None

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(height, width), upright, of each good picture by its path."""
        return {path: (entry.height, entry.width) for path, entry in self._entries.items() if entry.height}

    def content(self, paths: Iterable[str]) -> str:
        """sha256 of the pictures' files, and of the videos' sizes."""
        known = [(path, self._entries[path].bytes, self._entries[path].digest) for path in sorted(set(paths))]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Raises UserError where the folder can't be written to, Gone for a path that this file system can't have."""
    try:
        yield
    except OSError as error:
        if error.errno in FORBIDDEN:
            raise UserError(
                f"data.image_folder: {target} is missing, and can't be written ({error.strerror}); give a folder that can be "
                "written to, or put the file there, or take its source out of data.pictures to do without it"
            ) from error
        if error.errno in OF_THE_PATH:
            raise NotFoundError(f"{target} can't be written: {error.strerror}") from error
        raise


class _Fetcher:
    """Looks at one medium, and brings it if it is not there."""

    def __init__(self, folder: Path, places: Mapping[str, Sequence[Source]]) -> None:
        self.folder, self.places = folder, places
        # Threads are as many as a network can use; so many pictures decoded at once would only take memory.
        self.decoding = threading.BoundedSemaphore(os.cpu_count() or 1)

    def _check(self, kind: str, path: str, file: Path) -> Checked:
        with self.decoding:
            if kind == "video":
                check_video(file)
                return Checked(path, _num_bytes(file))
            width, height = open_picture(file).size
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
        return Checked(path, _num_bytes(file), height, width, digest)

    def _store(self, kind: str, path: str, data: bytes) -> Checked:
        target = self.folder / path
        part = target.parent / f".{os.getpid()}-{threading.get_ident()}.vzip-part"
        try:
            with _writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data)
            entry = self._check(kind, path, part)
            with _writing(target):
                part.replace(target)
            return entry
        finally:
            if part.exists():
                part.unlink()

    def _from_places(self, kind: str, path: str, places: Sequence[Source]) -> Checked | Fault:
        reasons, final = [], True
        for place in places:
            for number in range(NUM_READS):
                try:
                    return self._store(kind, path, place.read(path))
                except (
                    UserError
                ):  # it is a ValueError, but of the settings or the installation, and not of this picture
                    raise
                except (NotFoundError, TransientError) as error:
                    final = final and isinstance(error, NotFoundError)
                    reasons.append(str(error))
                    break
                except (OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno is not None:  # of the disk
                        raise
                    if number == NUM_READS - 1:
                        reasons.append(f"{place}: {error}")
        return Fault("; ".join(reasons), final)

    def _there(self, kind: str, path: str) -> tuple[Checked, bool]:
        """(what the folder has, whether another file may take its place)."""
        target, num_bytes = self.folder / path, -1
        try:
            num_bytes = _num_bytes(target)
            if num_bytes < 0:
                return Checked(path, num_bytes, fault="missing"), True
            return self._check(kind, path, target), False
        except UserError:  # it is a ValueError, but of the installation, and not of this file
            raise
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None)
            entry = Checked(path, num_bytes, fault=str(error), final=number is None or number in OF_THE_PATH)
            # Not a folder of frames, nor what only this user may not read.
            damaged = number is None and target.is_file()
            return entry, damaged and os.access(target.parent, os.W_OK)

    def __call__(self, medium: Medium) -> tuple[Medium, Checked, bool]:
        """(medium, what was found, whether places were asked)."""
        kind, path, source = medium
        assert not Path(path).is_absolute() and ".." not in Path(path).parts, (
            path
        )  # parse_row lets none through
        places = self.places.get(source, ())
        entry, replaceable = self._there(kind, path)
        asked = bool(entry.fault and replaceable and places)
        if asked:
            brought = self._from_places(kind, path, places)
            if isinstance(brought, Checked):
                return medium, brought, True
            entry = replace(entry, fault=brought.reason, final=brought.final)
        return medium, replace(entry, tried=tuple(map(str, places))) if entry.fault else entry, asked


class _FailureGuard:
    """Ends a command whose addresses are wrong, or whose network is gone, before tens of thousands of vain requests."""

    def __init__(self, places: Mapping[str, Sequence[Source]]) -> None:
        self.places = places
        self.num_good, self.num_bad, self.in_a_row = Counter[str](), Counter[str](), Counter[str]()

    def see(self, source: str, entry: Checked) -> None:
        """Count a medium that places were asked for. Raises UserError."""
        if not entry.fault:
            self.num_good[source] += 1
            self.in_a_row[source] = 0
            return
        self.num_bad[source] += 1
        self.in_a_row[source] = 0 if entry.final else self.in_a_row[source] + 1
        if self.num_bad[source] >= MAX_FAILURES and not self.num_good[source]:
            found = f"none of the first {self.num_bad[source]} pictures could be had from"
        elif self.in_a_row[source] >= MAX_FAILURES:
            found = f"{self.in_a_row[source]} pictures, one after the other, could not be had from"
        else:
            return
        raise UserError(
            f"data.pictures.{source}: {found} {', '.join(map(str, self.places[source]))}. The last one:\n  {entry.fault}\n"
            "Check the network and the place, or give others: addresses of copies, local folders, zip files. "
            "What came is kept: the same command goes on from there."
        )


def _clean(folders: Iterable[Path]) -> None:
    """Delete what commands that were killed had begun to write."""
    for folder in folders:
        with suppress(OSError, ValueError):  # it is read-only, where leftovers do no harm, or can't be there
            for file in folder.glob(".*.vzip-part"):
                if (match := LEFTOVER.fullmatch(file.name)) and not is_other_process(int(match[1])):
                    file.unlink()


def fetch_media(
    media: Iterable[Medium],
    folder: Path,
    *,
    places: Mapping[str, Sequence[Source]],
    media_index: MediaIndex,
    num_threads: int = 32,
) -> dict[str, Fault]:
    """See to it that media are whole in a folder; those that are missing or damaged are brought from their source's places.

    What the ledger knows is not looked at again. Files are written as they come, whatever their names say they are.

    Args:
        media: (kind, path below the folder, source) of each.
        folder: may be read-only where nothing is missing.
        places: of each source, asked in turn.
        ledger: is asked, and told.
        num_threads: that wait for servers; no more pictures are decoded at once than there are cores.

    Returns:
        The faults, by path.

    Raises:
        UserError: a place that is none, of which the first `MAX_FAILURES` pictures could all not be had, or whose servers have
            not answered for as many in a row; a folder that must be written to and can't be; no PyAV for video files.
        OSError: of the disk, as when it is full.
    """
    by_path = {path: (kind, path, source) for kind, path, source in media}
    known = {
        path: media_index.settled(path, folder, places.get(source, ()))
        for path, (_, _, source) in by_path.items()
    }
    todo = [medium for path, medium in by_path.items() if known[path] is None]
    found = [entry for entry in known.values() if entry is not None]
    _clean({(folder / path).parent for _, path, _ in todo})
    health = _FailureGuard(places)
    # Not an executor: its threads would keep a command that was interrupted until the last server has answered.
    with ThreadPool(min(num_threads, len(todo)) or 1) as pool:
        results = pool.imap_unordered(_Fetcher(folder, places), todo)
        bar = progress(results, total=len(by_path), start=len(found), title="pictures", unit="file")
        faults = sum(bool(entry.fault) for entry in found)
        for (_, _, source), entry, asked in bar:
            media_index.record(entry)
            found.append(entry)
            faults += bool(entry.fault)
            bar.set_postfix(faults=faults, refresh=False)
            if asked:
                health.see(source, entry)
    return {entry.path: Fault(entry.fault, entry.final) for entry in found if entry.fault}
