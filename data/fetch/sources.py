"""Sources of pictures: addresses, folders, and zip files on disk or at an address.

An example names a picture by its data source and its path in there (`coco/train2017/1.jpg`), like
LLaVA's instruction data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from data.fetch.archive import MAX_MEMBER, Archive, LocalFile, RemoteFile, parts_below_source, path_parts
from data.fetch.http import Client, NotFoundError, TransientError
from vzip import UserError
from vzip.redact import redacted

ALLOWED = "a base address (http://, https://), a zip file at such an address, a folder, or a zip file"


class Source(Protocol):
    """A place that pictures are fetched from.

    Its `str` is the entry in the settings, without the secrets of an address.
    """

    def read(self, path: str) -> bytes:
        """Return the file for an example's path. Any thread may call this.

        Raises:
            NotFoundError: there is no such file, or it can't be read.
            TransientError: the source did not answer.
            UserError: the source is not what the settings say.
        """


@dataclass(frozen=True)
class Address:
    """Files below a base address. An example's path without its data source is appended to it."""

    entry: str
    client: Client

    def __str__(self) -> str:
        return redacted(self.entry)

    def read(self, path: str) -> bytes:
        # The path goes in front of the address's query, which may hold a key.
        base = urlsplit(self.entry)
        file = quote("/".join(parts_below_source(path)))
        url = base._replace(path=f"{base.path.rstrip('/')}/{file}")
        return self.client.get(url.geturl())


@dataclass(frozen=True)
class Folder:
    """A folder that holds an example's path, or the end of it.

    It may be the folder of all pictures, or one deep below it.
    """

    entry: str

    def __str__(self) -> str:
        return self.entry

    def read(self, path: str) -> bytes:
        folder = Path(self.entry).expanduser()
        parts = path_parts(path)
        # Try the longest end first, because two data sources may have files of the same name.
        try:
            for start in range(len(parts)):
                file = folder.joinpath(*parts[start:])
                if file.is_file():
                    # Addresses and zip files have the same limit: what is read lies in memory.
                    if file.stat().st_size > MAX_MEMBER:
                        raise NotFoundError(
                            f"{file} has more than {MAX_MEMBER:,} bytes, which is not allowed"
                        )
                    return file.read_bytes()
        except NotFoundError:
            raise
        except OSError as error:
            # A network drive may be back later.
            raise TransientError(f"{file}: {error.strerror}") from error

        raise NotFoundError(f"{self.entry} holds no {path}")


def parse_source(entry: str, client: Client, *, setting: str = "data.pictures") -> Source:
    """Parse one entry of `data.pictures`. Makes no request. Raises UserError if it is invalid."""
    # Look for an address first: as a path, it would only be reported as missing.
    wrong = f"{setting}: {entry!r} is not {ALLOWED}"
    if "://" in entry:
        return _parse_address(entry, client, setting=setting, wrong=wrong)

    # An empty entry would stand for the working directory.
    path = Path(entry).expanduser()
    if entry and path.is_dir():
        return Folder(entry)
    if path.is_file():
        return Archive(entry, LocalFile(path), setting=setting)
    raise UserError(f"{wrong}: there is no such file or folder")


def _parse_address(entry: str, client: Client, *, setting: str, wrong: str) -> Source:
    """Parse an address: a zip file if its path ends in .zip, else a base address."""
    try:
        url = urlsplit(entry)
    except ValueError as error:
        raise UserError(f"{wrong} ({error})") from error

    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(wrong)
    if url.path.lower().endswith(".zip"):
        return Archive(entry, RemoteFile(entry, client), setting=setting)
    return Address(entry, client)


def open_sources(pictures: Mapping[str, Any] | None, client: Client) -> dict[str, list[Source]]:
    """Parse the setting `data.pictures`.

    Args:
        pictures: by the name of the data source: an entry, a list of entries, or None.
        client: client for addresses. No request is made yet.

    Returns:
        By the name of the data source: where its pictures are fetched from, in this order.

    Raises:
        UserError: an entry is invalid, or names a file or folder that does not exist.
    """
    sources = {}
    for name, entries in (pictures or {}).items():
        setting = f"data.pictures.{name}"
        # An entry, a list of entries, or nothing: all become a list.
        if entries is None:
            entries = []
        if isinstance(entries, str):
            entries = [entries]
        if not isinstance(entries, Sequence) or not all(isinstance(entry, str) for entry in entries):
            raise UserError(f"{setting}={entries} must be a list, each entry {ALLOWED}")
        sources[name] = [parse_source(entry, client, setting=setting) for entry in entries]
    return sources
