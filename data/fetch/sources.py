"""Where the pictures of a source are taken from: an address, a folder, a zip file, or a zip file at an address.

Rows name a picture by its source and its path there (`coco/train2017/1.jpg`), as LLaVA's instruction data does. A zip file is
never unpacked, and of one at an address only its directory and the wanted members are read.
Source of the format: PKWARE's APPNOTE.TXT, 4.3.7 (the local header).
"""

import errno
import io
import struct
import threading
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import quote, urlsplit
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from data.fetch.http import Client, NotFoundError, TransientError
from vzip import UserError

BLOCK = 4 << 20
"""Bytes of a zip file's directory that are asked for at once: GQA's has 14 MB."""
TAIL = 128 << 10
"""Last bytes of a zip file, which are read first: what says where its directory is, and all of a small one."""
MAX_MEMBER = 100_000_000
LOCAL_HEADER = 30
SLACK = 1024
"""Spare bytes asked for with a member: its own header may be longer than the directory says."""
ALLOWED = "a base address (http://, https://), a zip file at such an address, a folder, or a zip file"


class Source(Protocol):
    """One place that pictures are taken from; `str` of it is what the settings call it."""

    def read(self, path: str) -> bytes:
        """The file for a row's path; any thread may call it.

        Raises:
            Gone: there is none, or none that can be read.
            Unreachable: the place did not answer.
            UserError: the place is not what the settings say it is.
        """


def _parts(path: str) -> tuple[str, ...]:
    parts = PurePosixPath(path).parts
    assert parts and not PurePosixPath(path).is_absolute() and ".." not in parts, (
        path
    )  # parse_row lets none through
    return parts


def _below_source(path: str) -> tuple[str, ...]:
    """The parts of a path behind its first one, which is the source."""
    parts = _parts(path)
    return parts[1:] or parts


@dataclass(frozen=True)
class Address:
    """Files below an address: the row's path without its source is put behind it."""

    entry: str
    client: Client

    def __str__(self) -> str:
        return self.entry

    def read(self, path: str) -> bytes:
        base = urlsplit(self.entry)
        file = quote("/".join(_below_source(path)))
        return self.client.get(base._replace(path=f"{base.path.rstrip('/')}/{file}").geturl())


@dataclass(frozen=True)
class Folder:
    """A folder with a row's path in it, or with the end of it: it may be the folder of all pictures, or one deep below."""

    entry: str

    def __str__(self) -> str:
        return self.entry

    def read(self, path: str) -> bytes:
        folder, parts = Path(self.entry).expanduser(), _parts(path)
        try:
            for start in range(len(parts)):
                file = folder.joinpath(*parts[start:])
                if file.is_file():
                    return file.read_bytes()
        except OSError as error:
            raise TransientError(f"{file}: {error.strerror}") from error
        raise NotFoundError(f"{self.entry} holds no {path}")


class _Bytes(Protocol):
    """A file of which parts are read."""

    def size(self) -> int: ...

    def read(self, first: int, last: int) -> bytes: ...


@dataclass(frozen=True)
class _Local:
    path: Path

    def size(self) -> int:
        return self.path.stat().st_size

    def read(self, first: int, last: int) -> bytes:
        with self.path.open("rb") as file:  # one each: threads would move each other's position
            file.seek(first)
            return file.read(last - first + 1)


@dataclass(frozen=True)
class _Remote:
    url: str
    client: Client

    def size(self) -> int:
        return self.client.size(self.url)

    def read(self, first: int, last: int) -> bytes:
        return self.client.get(self.url, first=first, last=last)


class _RangeWindow(io.RawIOBase):
    """What zipfile reads a directory from: a seekable file, of which the tail is there and blocks are read when needed."""

    def __init__(self, content: _Bytes, size: int) -> None:
        self.content, self.length, self.position = content, size, 0
        self.tail_at = max(0, size - TAIL)
        self.tail = content.read(self.tail_at, size - 1) if size else b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.length)[whence]
        if self.position < 0:
            raise OSError(
                errno.EINVAL, "a place before the start of the file"
            )  # zipfile looks there in small files
        return self.position

    def readinto(self, buffer: Any) -> int:
        first = self.position
        if first >= self.tail_at:
            data = self.tail[first - self.tail_at :][: len(buffer)]
        else:
            data = self.content.read(first, min(first + min(len(buffer), BLOCK), self.tail_at) - 1)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class Archive:
    """A zip file. Its directory is read once; members are read by themselves, in any number of threads."""

    def __init__(self, entry: str, content: _Bytes, *, setting: str) -> None:
        self.entry, self._content, self._setting = entry, content, setting
        self._lock = threading.Lock()
        self._directory: dict[str, list[ZipInfo]] | OSError | UserError | None = None
        self._size = 0

    def __str__(self) -> str:
        return self.entry

    def _read_directory(self) -> dict[str, list[ZipInfo]]:
        try:
            self._size = self._content.size()
            with ZipFile(io.BufferedReader(_RangeWindow(self._content, self._size))) as archive:
                members = archive.NameToInfo.values()  # of members with the same name, the last
        except TransientError:
            raise
        except (NotFoundError, BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
            raise UserError(f"{self._setting}: {self.entry} can't be read as a zip file: {error}") from error
        by_name = defaultdict(list)
        for member in members:
            if not member.is_dir():
                by_name[member.filename.rsplit("/", 1)[-1]].append(member)
        return dict(by_name)

    def _members(self, name: str) -> list[ZipInfo]:
        """The members with a file name, in whatever folder."""
        with self._lock:
            if self._directory is None:
                try:
                    self._directory = self._read_directory()
                except (OSError, UserError) as error:
                    self._directory = (
                        error  # or each of the waiting threads would find out for itself, one after the other
                    )
            if isinstance(self._directory, Exception):
                raise self._directory
            return self._directory.get(name, [])

    def _find(self, path: str) -> ZipInfo:
        """The member whose path has the longest end in common with the row's.

        One of the two must end there (the row's does behind its source): `VG_100K_2/1.jpg` is not `vg/VG_100K/1.jpg`.
        """
        parts, num_wanted = _parts(path), len(_below_source(path))
        found = []
        for member in self._members(parts[-1]):
            names = PurePosixPath(member.filename).parts
            same = [mine == other for mine, other in zip(reversed(parts), reversed(names), strict=False)]
            num_same = (*same, False).index(False)
            if num_same == len(names) or num_same >= num_wanted:
                found.append(((num_same, -len(names)), member))
        if not found:
            raise NotFoundError(f"{self.entry} holds no {path}")
        best = max(rank for rank, _ in found)
        best_members = [member for rank, member in found if rank == best]
        if len(best_members) > 1:
            raise NotFoundError(
                f"{self.entry} holds {path} more than once: {', '.join(member.filename for member in best_members[:3])}"
            )
        return best_members[0]

    def read(self, path: str) -> bytes:
        member = self._find(path)
        name = f"{member.filename} in {self.entry}"
        if member.flag_bits & 1:
            raise NotFoundError(f"{name} is encrypted")
        if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise NotFoundError(
                f"{name} is compressed by method {member.compress_type}; stored (0) and deflate (8) can be read"
            )
        if max(member.file_size, member.compress_size) > MAX_MEMBER:
            raise NotFoundError(
                f"{name} has {member.file_size:,} bytes, and at most {MAX_MEMBER:,} are taken"
            )
        try:
            data = self._raw(member)
            if member.compress_type == ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.file_size + 1)
        except (zlib.error, struct.error, ValueError) as error:
            raise NotFoundError(f"{name} is damaged: {error}") from error
        if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
            raise NotFoundError(
                f"{name} is damaged: it has another checksum than the zip file's directory says"
            )
        return data

    def _raw(self, member: ZipInfo) -> bytes:
        """A member as it is stored: one reading, mostly. Raises ValueError and struct.error where the file is damaged."""
        first = member.header_offset
        if not 0 <= first < self._size:
            raise ValueError("it lies outside of the file")

        def read(num_bytes: int) -> bytes:
            return self._content.read(first, min(first + num_bytes, self._size) - 1)

        data = read(LOCAL_HEADER + len(member.orig_filename.encode()) + SLACK + member.compress_size)
        if not data.startswith(b"PK\3\4"):
            raise ValueError("it is not where the zip file's directory says")
        start = LOCAL_HEADER + sum(
            struct.unpack_from("<HH", data, 26)
        )  # the lengths of its name and of what is extra
        if len(data) < start + member.compress_size:
            data = read(start + member.compress_size)
        return data[start : start + member.compress_size]


def parse_source(entry: str, client: Client, *, setting: str = "data.fetch.pictures") -> Source:
    """The place that an entry of a setting names; nothing is asked for yet. Raises UserError if it is none."""
    wrong = f"{setting}: {entry!r} is not {ALLOWED}"
    if "://" in entry:
        try:
            url = urlsplit(entry)
        except ValueError as error:
            raise UserError(f"{wrong} ({error})") from error
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(wrong)
        is_zip = url.path.lower().endswith(".zip")
        return Archive(entry, _Remote(entry, client), setting=setting) if is_zip else Address(entry, client)
    path = Path(entry).expanduser()
    if entry and path.is_dir():
        return Folder(entry)
    if path.is_file():
        return Archive(entry, _Local(path), setting=setting)
    raise UserError(f"{wrong}: there is no such file or folder")


def open_sources(pictures: Mapping[str, Any] | None, client: Client) -> dict[str, list[Source]]:
    """The places of each source, by the setting `data.fetch.pictures`: for a source an entry, a list of them, or null.

    Raises:
        UserError: an entry that is no place; files and folders must be there, addresses are not asked yet.
    """
    places = {}
    for source, entries in (pictures or {}).items():
        setting = f"data.pictures.{source}"
        entries = [] if entries is None else [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, Sequence) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{setting}={entries} must be a list of places, each {ALLOWED}")
        places[source] = [parse_source(entry, client, setting=setting) for entry in entries]
    return places
