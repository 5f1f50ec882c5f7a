"""Fetch the pictures and videos of a subset into its folder, and check each once.

Each file is decoded before it is put into the folder, and the folder never holds half a file. After
a kill, the same command continues behind the files that are done.
"""

import errno
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

from data.fetch.http import NotFoundError, TransientError
from data.fetch.media_index import Checked, MediaIndex, media_bytes
from data.fetch.sources import Source
from data.progress import progress
from vzip import UserError
from vzip.files import atomic_write, delete_leftovers
from vzip.pictures import open_picture
from vzip.redact import HIDDEN
from vzip.videos import check_video

MAX_FAILURES = 50
"""Give up a source if so many of its first requests fail, or so many in a row get no answer."""
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
"""Errors of a folder that can't be written to."""
BAD_PATH = {
    errno.EEXIST,
    errno.EILSEQ,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
}
"""Errors that come from the path itself, so a later attempt meets them again."""

Medium = tuple[str, str, str]
"""(kind, path below the folder, name of the data source, such as "coco")."""


@dataclass(frozen=True)
class Fault:
    """Why a picture or video can't be used.

    Attributes:
        reason: a text for the user.
        final: True if asking the same sources again would not help.
    """

    reason: str
    final: bool


class _DamagedError(Exception):
    """A file is there, but is not a whole picture or video."""


@contextmanager
def _explain_write_errors(target: Path) -> Iterator[None]:
    """Raise UserError if the folder is read-only, NotFoundError if the path is impossible here."""
    try:
        yield
    except OSError as error:
        if error.errno in FORBIDDEN:
            raise UserError(
                f"data.image_folder: {target} is missing, and can't be written ({error.strerror}); "
                "give a folder that can be written to, or put the file there, "
                "or take its source out of data.pictures to do without it"
            ) from error
        if error.errno in BAD_PATH:
            raise NotFoundError(f"{target} can't be written: {error.strerror}") from error
        raise


class _Fetcher:
    """Checks one picture or video, and fetches it if it is missing or damaged.

    Threads share a fetcher.
    """

    def __init__(self, folder: Path, sources: Mapping[str, Sequence[Source]]) -> None:
        self.folder = folder
        self.sources = sources
        # There are more threads than cores, because most wait for servers. Decoding in all of them
        # would only take memory.
        self.decoding = threading.BoundedSemaphore(os.cpu_count() or 1)

    def __call__(self, medium: Medium) -> tuple[Medium, Checked, bool]:
        """Return (medium, its entry for the index, whether sources were asked)."""
        kind, path, source_name = medium
        # `parse_conversation` has refused other paths.
        assert not Path(path).is_absolute() and ".." not in Path(path).parts, path

        # A whole file in the folder is never fetched again, whatever the settings say.
        sources = self.sources.get(source_name, ())
        entry, may_replace = self._look(kind, path)
        must_fetch = bool(entry.fault and may_replace and sources)
        if must_fetch:
            fetched = self._fetch(kind, path, sources)
            if isinstance(fetched, Checked):
                return medium, fetched, True
            entry = replace(entry, fault=fetched.reason, final=fetched.final)

        # Record the sources, so that the next command asks only those that are new. One whose
        # address holds a key is always asked again: the key may have expired.
        if entry.fault:
            names = map(str, sources)
            entry = replace(entry, tried=tuple(name for name in names if HIDDEN not in name))
        return medium, entry, must_fetch

    def _look(self, kind: str, path: str) -> tuple[Checked, bool]:
        """Return (what the folder holds, whether a fetched file may take its place)."""
        target = self.folder / path
        num_bytes = -1
        try:
            num_bytes = media_bytes(target)
            if num_bytes < 0:
                return Checked(path, num_bytes, fault="missing"), True
            return self._check(kind, path, target), False
        except UserError:
            raise
        except _DamagedError as error:
            # Never replace a folder of frames, or a file in a read-only folder.
            may_replace = target.is_file() and os.access(target.parent, os.W_OK)
            return Checked(path, num_bytes, fault=str(error)), may_replace
        except (OSError, ValueError) as error:
            # An error of the path stays. An error of the disk may pass.
            number = getattr(error, "errno", None)
            final = number is None or number in BAD_PATH
            return Checked(path, num_bytes, fault=str(error), final=final), False

    def _check(self, kind: str, path: str, file: Path) -> Checked:
        """Decode a file.

        Raises _DamagedError, OSError for errors of the disk, and UserError without PyAV.
        """
        try:
            with self.decoding:
                if kind == "video":
                    check_video(file)
                    return Checked(path, media_bytes(file))

                # The size goes into the token arrays, and the hash tells a replaced picture.
                width, height = open_picture(file).size
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
                return Checked(path, media_bytes(file), height, width, digest)
        except UserError:
            # UserError is a ValueError, but this one is about the installation, not the file.
            raise
        except (OSError, ValueError) as error:
            # Errors of the disk have a number. Errors about the content have none.
            if getattr(error, "errno", None) is not None:
                raise
            raise _DamagedError(str(error)) from error

    def _fetch(self, kind: str, path: str, sources: Sequence[Source]) -> Checked | Fault:
        """Ask the sources in turn until one has the file."""
        # The fault is final only if every source has answered.
        reasons = []
        final = True
        for source in sources:
            try:
                return self._fetch_from(source, kind, path)
            except UserError:
                raise
            except NotFoundError as error:
                reasons.append(str(error))
            except TransientError as error:
                reasons.append(str(error))
                final = False
            except (_DamagedError, OSError, ValueError) as error:
                # With an error number, the disk has failed and not the source.
                if getattr(error, "errno", None) is not None:
                    raise
                reasons.append(f"{source}: {error}")

        return Fault("; ".join(reasons), final)

    def _fetch_from(self, source: Source, kind: str, path: str) -> Checked:
        """Store a file of a source in the folder. Read it once more if it comes damaged."""
        try:
            return self._store(kind, path, source.read(path))
        except _DamagedError:
            # It may have broken on the way. After all other faults, the client tries again itself.
            return self._store(kind, path, source.read(path))

    def _store(self, kind: str, path: str, data: bytes) -> Checked:
        """Put a file into the folder, if it is whole."""
        target = self.folder / path
        with _explain_write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            # `fetch_media` has deleted the scratch files of killed processes, once for the folder.
            with atomic_write(target, clean=False) as scratch:
                scratch.write_bytes(data)
                return self._check(kind, path, scratch)


class _FailureGuard:
    """Ends a command if its addresses are wrong, or the network is gone.

    Without it, such a command would make tens of thousands of requests in vain.
    """

    def __init__(self, sources: Mapping[str, Sequence[Source]]) -> None:
        self.sources = sources
        self.num_good: Counter[str] = Counter()
        self.num_bad: Counter[str] = Counter()
        # Requests without an answer since the last answer.
        self.num_unanswered: Counter[str] = Counter()

    def see(self, source_name: str, entry: Checked) -> None:
        """Count a picture or video that sources were asked for.

        Raises UserError if the source has failed too often.
        """
        if not entry.fault:
            self.num_good[source_name] += 1
            self.num_unanswered[source_name] = 0
            return

        # "There is no such file" is an answer too, so the network works.
        self.num_bad[source_name] += 1
        if entry.final:
            self.num_unanswered[source_name] = 0
        else:
            self.num_unanswered[source_name] += 1

        num_bad = self.num_bad[source_name]
        num_unanswered = self.num_unanswered[source_name]
        if num_bad >= MAX_FAILURES and not self.num_good[source_name]:
            self._stop(source_name, f"none of the first {num_bad} pictures could be fetched", entry)
        if num_unanswered >= MAX_FAILURES:
            self._stop(source_name, f"{num_unanswered} pictures in a row could not be fetched", entry)

    def _stop(self, source_name: str, what_failed: str, entry: Checked) -> None:
        sources = ", ".join(map(str, self.sources[source_name]))
        raise UserError(
            f"data.pictures.{source_name}: {what_failed} from {sources}. The last one:\n  {entry.fault}\n"
            "Check the network and this setting, or give other sources: addresses of copies, local folders, "
            "zip files. The files that came are kept: the same command continues from there."
        )


def _look_up(
    media: Iterable[Medium],
    folder: Path,
    sources: Mapping[str, Sequence[Source]],
    media_index: MediaIndex,
) -> tuple[list[Checked], list[Medium]]:
    """Return (entries that still hold, pictures and videos that must be looked at)."""
    known = []
    todo = []
    for medium in media:
        _, path, source_name = medium
        entry = media_index.lookup(path, folder, sources.get(source_name, ()))
        if entry is None:
            todo.append(medium)
        else:
            known.append(entry)
    return known, todo


def _delete_leftovers_of(media: Iterable[Medium], folder: Path) -> None:
    """Delete what killed commands had begun to write in the folders of these files."""
    for parent in {(folder / path).parent for _, path, _ in media}:
        # Leftovers in a folder that can't be written to do no harm. A folder that can't exist has
        # none.
        with suppress(OSError, ValueError):
            delete_leftovers(parent)


def fetch_media(
    media: Iterable[Medium],
    folder: Path,
    *,
    sources: Mapping[str, Sequence[Source]],
    media_index: MediaIndex,
    num_threads: int = 32,
) -> dict[str, Fault]:
    """Make sure that a folder holds whole pictures and videos. Fetch missing and damaged ones.

    Files whose entry in the index still holds are not looked at again. Fetched bytes are written
    unchanged, even if they are another kind of picture than the name says.

    Args:
        media: (kind, path below the folder, name of the data source) of each.
        folder: folder of the pictures and videos. It may be read-only if nothing is missing.
        sources: by the name of the data source, where its files are fetched from, in this order.
        media_index: what is known of the files. New entries are added.
        num_threads: threads that wait for servers. No more pictures are decoded at once than there
            are cores.

    Returns:
        The faults, by path.

    Raises:
        UserError: an entry of `data.pictures` is wrong; the first `MAX_FAILURES` pictures of a
            source, or as many in a row, could not be fetched; the folder can't be written to; PyAV
            is missing.
        OSError: the disk failed, or is full.
    """
    # Several examples may show the same picture.
    by_path = {path: (kind, path, source_name) for kind, path, source_name in media}

    # Files that were found missing before, and whose sources are the same, are faults again.
    known, todo = _look_up(by_path.values(), folder, sources, media_index)
    faults = {entry.path: Fault(entry.fault, entry.final) for entry in known if entry.fault}
    _delete_leftovers_of(todo, folder)

    # Not an executor: its threads would keep an interrupted command alive until the last server has
    # answered.
    guard = _FailureGuard(sources)
    with ThreadPool(min(num_threads, len(todo)) or 1) as pool:
        results = pool.imap_unordered(_Fetcher(folder, sources), todo)
        bar = progress(results, total=len(by_path), start=len(known), title="pictures", unit="file")

        # Record each file as soon as it is done, so that a killed command loses nothing.
        for (_, path, source_name), entry, was_asked in bar:
            media_index.record(entry)
            if entry.fault:
                faults[path] = Fault(entry.fault, entry.final)
            bar.set_postfix(faults=len(faults), refresh=False)
            if was_asked:
                guard.see(source_name, entry)

    return faults
