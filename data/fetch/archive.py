"""Read members of a zip file, on disk or at an address, without unpacking it.

At an address, only the zip file's directory and the wanted members are read.
Source of the format: PKWARE's APPNOTE.TXT, 4.3.7 (the local header).
"""

import errno
import io
import struct
import threading
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from data.fetch.http import Client, NotFoundError, TransientError
from vzip import UserError
from vzip.redact import redacted

BLOCK = 4 << 20
"""Bytes of a zip file's directory that one request reads: GQA's directory has 14 MB."""
TAIL = 128 << 10
"""Bytes at the end of a zip file that are read first.

They say where the directory is. A small directory is in them already.
"""
MAX_DIRECTORY = 500_000_000
"""Largest directory, in bytes: a million members need a third of it.

It is read into memory, and a damaged or lying file may say that it has any size.
"""
MAX_MEMBER = 100_000_000
"""Largest member, in bytes."""
LOCAL_HEADER = 30
"""Bytes of the header in front of a member, without the name."""
SLACK = 1024
"""Spare bytes that are read with a member: its own header may be longer than the directory says."""
NAME_LENGTHS = 26
"""Where the header has the lengths of the member's name and of its extra field."""


def path_parts(path: str) -> tuple[str, ...]:
    """Return the parts of an example's path, which never leaves the image folder."""
    parts = PurePosixPath(path).parts
    # `parse_conversation` has refused other paths.
    assert parts and not PurePosixPath(path).is_absolute() and ".." not in parts, path
    return parts


def parts_below_source(path: str) -> tuple[str, ...]:
    """Return the parts of a path without its first one, which names the data source."""
    # A path of one part has no data source in it.
    parts = path_parts(path)
    return parts[1:] or parts


class RandomAccess(Protocol):
    """A file that can be read in parts. Threads may share it."""

    def size(self) -> int:
        """Return the bytes of the whole file."""

    def read(self, first: int, last: int) -> bytes:
        """Return the bytes `first` to `last`, both included."""


@dataclass(frozen=True)
class LocalFile:
    """A file on disk."""

    path: Path

    def size(self) -> int:
        return self.path.stat().st_size

    def read(self, first: int, last: int) -> bytes:
        # Each call opens the file: threads with one open file would move each other's position.
        with self.path.open("rb") as file:
            file.seek(first)
            return file.read(last - first + 1)


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address whose server sends parts of files."""

    url: str
    client: Client

    def size(self) -> int:
        return self.client.size(self.url)

    def read(self, first: int, last: int) -> bytes:
        return self.client.get(self.url, first=first, last=last)


class _DirectoryReader(io.RawIOBase):
    """A seekable file for `zipfile`.

    The tail of the file is in memory, and blocks before it are read when they are needed.
    """

    def __init__(self, content: RandomAccess, size: int) -> None:
        self.content = content
        self.length = size
        self.position = 0
        self.tail_start = max(0, size - TAIL)
        self.tail = content.read(self.tail_start, size - 1) if size else b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = origin + offset
        # zipfile looks before the start of small files, and expects the error of a real file.
        if self.position < 0:
            raise OSError(errno.EINVAL, "a position before the start of the file")
        # zipfile goes back to where the directory starts, and nowhere before it.
        if self.length - self.position > MAX_DIRECTORY:
            raise BadZipFile(f"its directory has more than {MAX_DIRECTORY:,} bytes")
        return self.position

    def readinto(self, buffer: Any) -> int:
        # The whole directory is often in the tail. Then nothing more is read.
        first = self.position
        if first >= self.tail_start:
            start = first - self.tail_start
            data = self.tail[start : start + len(buffer)]
        else:
            end = min(first + min(len(buffer), BLOCK), self.tail_start)
            data = self.content.read(first, end - 1)

        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _common_end(parts: tuple[str, ...], others: tuple[str, ...]) -> int:
    """Count the parts at the end of two paths that are the same."""
    count = 0
    for part, other in zip(reversed(parts), reversed(others), strict=False):
        if part != other:
            break
        count += 1
    return count


class Archive:
    """A zip file as a source.

    Its directory is read once. Any number of threads may read members.
    """

    def __init__(self, entry: str, content: RandomAccess, *, setting: str) -> None:
        self.name = redacted(entry)
        self._content = content
        self._setting = setting
        self._lock = threading.Lock()
        self._directory: dict[str, list[ZipInfo]] | OSError | UserError | None = None
        self._size = 0

    def __str__(self) -> str:
        return self.name

    def read(self, path: str) -> bytes:
        """Return the member for an example's path, see `Source.read`."""
        member = self._find(path)
        name = f"{member.filename} in {self.name}"
        self._check_readable(member, name)

        try:
            data = self._read_stored(member)
            if member.compress_type == ZIP_DEFLATED:
                # Ask for one byte more than promised, so that a longer member is noticed. The
                # limit also keeps a member from filling the memory.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.file_size + 1)
        except (zlib.error, struct.error, ValueError) as error:
            raise NotFoundError(f"{name} is damaged: {error}") from error

        # The file may have changed since its directory was read, or a proxy has sent a web page.
        if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
            raise NotFoundError(
                f"{name} is damaged: it has another checksum than the zip file's directory says"
            )
        return data

    def _read_directory(self) -> dict[str, list[ZipInfo]]:
        """Return the members by their file name, whatever their folder is."""
        try:
            self._size = self._content.size()
            with ZipFile(io.BufferedReader(_DirectoryReader(self._content, self._size))) as archive:
                # If the archive holds a name twice, this is the last member with the name.
                members = archive.NameToInfo.values()
        except TransientError:
            # The server may answer later, so the setting is not wrong.
            raise
        except (NotFoundError, BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
            raise UserError(f"{self._setting}: {self.name} can't be read as a zip file: {error}") from error

        # By file name, because the archive's folders may differ from those of the examples' paths.
        by_name = defaultdict(list)
        for member in members:
            if not member.is_dir():
                by_name[member.filename.rsplit("/", 1)[-1]].append(member)
        return dict(by_name)

    def _members(self, name: str) -> list[ZipInfo]:
        """Return the members with a file name. Read the directory first if no thread has."""
        # The lock makes one thread read the directory, while the others wait for it.
        with self._lock:
            if self._directory is None:
                try:
                    self._directory = self._read_directory()
                except (OSError, UserError) as error:
                    # Keep the error, or each of the waiting threads would ask the server again.
                    self._directory = error

            if isinstance(self._directory, Exception):
                raise self._directory
            return self._directory.get(name, [])

    def _find(self, path: str) -> ZipInfo:
        """Return the member whose path has the longest end in common with an example's path.

        The common end must be the whole path of the member, or the example's whole path below the
        data source: `VG_100K_2/1.jpg` is not `vg/VG_100K/1.jpg`.

        Raises NotFoundError if there is no such member, or more than one.
        """
        parts = path_parts(path)
        num_wanted = len(parts_below_source(path))

        # Several members may be the best, and then nobody knows which picture is meant.
        best: list[ZipInfo] = []
        best_rank = (0, 0)
        for member in self._members(parts[-1]):
            names = PurePosixPath(member.filename).parts
            num_same = _common_end(parts, names)
            if num_same < len(names) and num_same < num_wanted:
                continue

            # If two members have the same common end, the shorter path is meant.
            rank = (num_same, -len(names))
            if not best or rank > best_rank:
                best = [member]
                best_rank = rank
            elif rank == best_rank:
                best.append(member)

        if not best:
            raise NotFoundError(f"{self.name} holds no {path}")
        if len(best) > 1:
            names_of_best = ", ".join(member.filename for member in best[:3])
            raise NotFoundError(f"{self.name} holds {path} more than once: {names_of_best}")
        return best[0]

    def _check_readable(self, member: ZipInfo, name: str) -> None:
        """Raise NotFoundError if a member is encrypted, too large, or of a rare compression."""
        # Bit 0 stands for encryption.
        if member.flag_bits & 1:
            raise NotFoundError(f"{name} is encrypted")
        if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise NotFoundError(
                f"{name} is compressed by method {member.compress_type}; "
                f"stored (0) and deflate (8) can be read"
            )
        if max(member.file_size, member.compress_size) > MAX_MEMBER:
            raise NotFoundError(f"{name} has {member.file_size:,} bytes; at most {MAX_MEMBER:,} are allowed")

    def _read_stored(self, member: ZipInfo) -> bytes:
        """Return the bytes of a member as they are stored in the zip file.

        Raises ValueError and struct.error if the file is damaged.
        """
        # A damaged directory may name a place outside the file.
        first = member.header_offset
        if not 0 <= first < self._size:
            raise ValueError("it lies outside of the file")

        def read(num_bytes: int) -> bytes:
            return self._content.read(first, min(first + num_bytes, self._size) - 1)

        # Read the header and the member in one request. The directory does not say how long the
        # header is, so a very long one costs a second request.
        header_length = LOCAL_HEADER + len(member.orig_filename.encode()) + SLACK
        data = read(header_length + member.compress_size)
        if not data.startswith(b"PK\3\4"):
            raise ValueError("it is not where the zip file's directory says")

        # The member begins behind its own header, whose name and extra field have any length.
        name_length, extra_length = struct.unpack_from("<HH", data, NAME_LENGTHS)
        start = LOCAL_HEADER + name_length + extra_length
        end = start + member.compress_size
        if len(data) < end:
            data = read(end)
        return data[start:end]
