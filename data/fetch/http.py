"""Files, and parts of files, over HTTP: tried again where that can help, never half, never endless."""

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

from tqdm import tqdm
from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Retry, Timeout, make_headers
from urllib3.exceptions import HTTPError, InvalidHeader, LocationValueError, MaxRetryError, ResponseError
from urllib3.util import parse_url

from data.progress import progress
from vzip import UserError

T = TypeVar("T")

CHUNK = 1 << 20
MAX_WAIT_S = 60.0
"""Between two attempts, also where a server asks for more."""
HEADERS = {"User-Agent": "vzip", "Accept-Encoding": "identity"}
# urllib3 follows redirects; attempts are ours, because a body that breaks off has to be asked for again too.
REDIRECTS = Retry(
    total=None, connect=0, read=0, redirect=5, status=0, other=0, respect_retry_after_header=False
)
MAX_CONNECTIONS = 64


class NotFoundError(OSError):
    """An address has not got what was asked for, or sends what can't be taken. Asking again does not help."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class TransientError(OSError):
    """An address gave no proper answer: refused, dropped, stalled, broken off, 429, 5xx. It may another time."""

    def __init__(self, message: str, *, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s
        """What the server asked to wait for."""


def _manager(scheme: str) -> PoolManager:
    """By the proxy that the environment names for a scheme, as `http_proxy` and `https_proxy` do, or straight on."""
    proxy = getproxies().get(scheme)
    if not proxy:
        return PoolManager(maxsize=MAX_CONNECTIONS)
    url = parse_url(proxy if "://" in proxy else f"http://{proxy}")
    if url.scheme not in ("http", "https"):
        raise UserError(
            f"{scheme}_proxy={proxy} in the environment is not an http or https proxy; set one, or unset it"
        )
    login = make_headers(proxy_basic_auth=unquote(url.auth)) if url.auth else None
    return ProxyManager(url.url, proxy_headers=login, maxsize=MAX_CONNECTIONS)


def _wait_asked_s(response: BaseHTTPResponse) -> float:
    try:
        return float(REDIRECTS.get_retry_after(response) or 0)
    except (InvalidHeader, ValueError, OverflowError):  # the two of dates that no calendar has
        return 0.0


def _check_status(response: BaseHTTPResponse, url: str) -> None:
    status = response.status
    if status in (200, 206):
        return
    message = f"{url}: answered {status} {response.reason or ''}".rstrip()
    if status >= 500 or status in (408, 425, 429):
        raise TransientError(message, wait_s=_wait_asked_s(response))
    raise NotFoundError(message, status=status)


def _content_range(response: BaseHTTPResponse, url: str) -> tuple[int, int]:
    """(first byte, bytes of the whole file) of an answer to a request for a part. Raises Gone for any other answer."""
    if response.status != 206:
        raise NotFoundError(
            f"{url}: sends no parts of files (HTTP ranges); download the whole file, and give its path"
        )
    header = response.headers.get("Content-Range", "")
    if not (match := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", header.strip())):
        raise NotFoundError(f"{url}: sends a part of a file, but not which one (Content-Range: {header!r})")
    return int(match[1]), int(match[2])


@dataclass(eq=False)
class Client:
    """Asks web servers, patiently but not for ever. All threads may share one: it keeps connections open."""

    attempts: int = 5
    first_wait_s: float = 1.0
    """Before the second attempt; it doubles each time, up to `MAX_WAIT_S`, and is spread by half either way."""
    connect_s: float = 10.0
    read_s: float = 30.0
    """Silence after which a server has stalled."""
    total_s: float = 180.0
    """For one picture, or one part of a file, with all attempts and waits: a server may also send a byte now and then."""
    max_bytes: int = 100_000_000
    """Of one picture, or one part of a file."""

    def __post_init__(self) -> None:
        self._direct = PoolManager(maxsize=MAX_CONNECTIONS)
        self._managers = {scheme: _manager(scheme) for scheme in ("http", "https")}

    @contextmanager
    def answer(
        self, url: str, headers: dict[str, str], *, left_s: float | None = None
    ) -> Iterator[BaseHTTPResponse]:
        """An answer of status 200 or 206, its body still to be read, after redirects; one attempt.

        Raises Gone and Unreachable, also for what goes wrong while the body is read.
        """
        left_s = self.read_s if left_s is None else max(left_s, 0.001)
        timeout = Timeout(connect=min(self.connect_s, left_s), read=min(self.read_s, left_s))
        try:
            parts = parse_url(url)
            if parts.scheme not in self._managers:
                raise NotFoundError(f"{url} is no address of the web (http://, https://)")
            manager = self._direct if proxy_bypass(parts.host or "") else self._managers[parts.scheme]
            options: dict[str, Any] = {
                "preload_content": False,
                "decode_content": False,
                "retries": REDIRECTS,
            }
            response = manager.request("GET", url, headers=HEADERS | headers, timeout=timeout, **options)
            try:
                _check_status(response, url)
                yield response
            finally:
                response.close()  # one that was read to its end has given its connection back before
        except (
            LocationValueError,
            UnicodeError,
        ) as error:  # not an address, of a scheme that is none of ours, or no host
            raise NotFoundError(f"{url}: {error}") from error
        except MaxRetryError as error:
            if isinstance(error.reason, ResponseError):
                raise NotFoundError(f"{url}: {error.reason}") from error
            raise TransientError(f"{url}: {error.reason}") from error
        except HTTPError as error:
            raise TransientError(f"{url}: {error}") from error

    def wait_s(self, failures: int, error: TransientError) -> float:
        """Seconds to wait after so many failed attempts."""
        spread = random.Random().uniform(0.5, 1.5)  # not the global generator: runs are seeded
        return min(MAX_WAIT_S, max(error.wait_s, self.first_wait_s * 2.0 ** (failures - 1) * spread))

    def _patiently(self, ask: Callable[[float], T]) -> T:
        """What `ask` gives for the time (monotonic clock, s) at which it has to be done."""
        deadline = time.monotonic() + self.total_s
        for attempt in range(1, self.attempts + 1):
            try:
                return ask(deadline)
            except TransientError as error:
                wait_s = self.wait_s(attempt, error)
                if attempt == self.attempts or time.monotonic() + wait_s > deadline:
                    raise TransientError(f"{error} (given up after {attempt} attempts)") from error
            time.sleep(wait_s)
        raise AssertionError("attempts must be positive")

    def _body(self, response: BaseHTTPResponse, url: str, deadline: float) -> bytes:
        data = bytearray()
        if (response.length_remaining or 0) > self.max_bytes:
            raise NotFoundError(
                f"{url}: {response.length_remaining:,} bytes, and at most {self.max_bytes:,} are taken"
            )
        while chunk := response.read1(CHUNK):  # whatever has come: read() would wait for all of a chunk
            data += chunk
            if len(data) > self.max_bytes:
                raise NotFoundError(f"{url}: more than {self.max_bytes:,} bytes")
            if time.monotonic() > deadline:
                raise TransientError(f"{url}: only {len(data):,} bytes came in {self.total_s:g} s")
        return bytes(data)

    def get(self, url: str, *, first: int | None = None, last: int | None = None) -> bytes:
        """The file at an address, or its bytes `first` to `last`, both included.

        Raises:
            Gone: it is not there, is larger than `max_bytes`, or a part was asked for and the server sends no parts.
            Unreachable: no whole answer after all attempts.
        """

        def ask(deadline: float) -> bytes:
            headers = {} if first is None else {"Range": f"bytes={first}-{last}"}
            with self.answer(url, headers, left_s=deadline - time.monotonic()) as response:
                if first is not None and (start := _content_range(response, url)[0]) != first:
                    raise NotFoundError(f"{url}: sends from byte {start} where {first} was asked for")
                data = self._body(response, url, deadline)
            if num_wanted is not None and len(data) != num_wanted:
                raise TransientError(f"{url}: {len(data):,} bytes came for bytes {first:,} to {last:,}")
            return data

        num_wanted = None if first is None or last is None else last - first + 1
        return self._patiently(ask)

    def size(self, url: str) -> int:
        """Bytes of the file at an address, whose server must send parts of files. Raises Gone and Unreachable as `get`."""

        def ask(deadline: float) -> int:
            # Not HEAD: addresses that are signed are so for one method.
            with self.answer(url, {"Range": "bytes=0-0"}, left_s=deadline - time.monotonic()) as response:
                return _content_range(response, url)[1]

        return self._patiently(ask)


def _version(response: BaseHTTPResponse) -> str:
    """What tells one version of a file from another, byte by byte; empty if the server does not say."""
    tag: str = response.headers.get("ETag", "")
    return response.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag


class _Part:
    """What there is of a file (`.part`), and of which version of it (`.part.json`)."""

    def __init__(self, target: Path, url: str) -> None:
        self.path = target.with_name(f"{target.name}.part")
        self.about = target.with_name(f"{target.name}.part.json")
        self.url = url

    def num_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def known(self) -> dict[str, Any]:
        """{"url", "version", "size"} of what there is, if the rest of it can be asked for, else {}."""
        try:
            about = json.loads(self.about.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        usable = (
            isinstance(about, dict)
            and about.get("url") == self.url
            and about.get("version")
            and self.num_bytes()
        )
        return about if usable else {}

    def start(self, *, version: str, size: int | None) -> None:
        self.path.write_bytes(
            b""
        )  # first: what is said about it must never be said of an older version's bytes
        self.about.write_text(
            json.dumps({"url": self.url, "version": version, "size": size}), encoding="utf-8"
        )

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)


def _check_free_space(part: _Part, size: int | None) -> None:
    needed, free = (size or 0) - part.num_bytes(), shutil.disk_usage(part.path.parent).free
    if needed > free:
        raise UserError(
            f"{part.url} needs {needed:,} bytes in {part.path.parent}, and {free:,} are free there; free some space, "
            "or give another folder"
        )


def _append(client: Client, part: _Part, bar: "tqdm[Any]") -> None:
    """One attempt to get the rest of a file."""
    known, have = part.known(), part.num_bytes()
    if known and known["size"] == have:
        return
    headers = {"Range": f"bytes={have}-", "If-Range": known["version"]} if known else {}
    try:
        with client.answer(part.url, headers) as response:
            if (
                known and response.status == 206
            ):  # else the whole file comes: it has changed, or parts are not sent
                same = _version(response) in ("", known["version"])  # it need not be said again
                if _content_range(response, part.url) != (have, known["size"]) or not same:
                    part.forget()
                    raise TransientError(f"{part.url}: the file has changed")
            else:
                part.start(version=_version(response), size=response.length_remaining)
            size = (
                part.num_bytes() + response.length_remaining
                if response.length_remaining is not None
                else None
            )
            _check_free_space(part, size)
            bar.total, bar.n = size, part.num_bytes()
            with part.path.open("ab") as file:
                while chunk := response.read1(CHUNK):
                    file.write(chunk)
                    file.flush()  # or a kill would take what came last
                    bar.update(len(chunk))
            if size not in (None, part.num_bytes()):
                raise TransientError(f"{part.url}: {part.num_bytes():,} of {size:,} bytes are there")
    except NotFoundError as error:
        if error.status != 416:
            raise
        part.forget()
        raise TransientError(f"{part.url}: the file has changed") from error


def fetch_file(url: str, target: Path, *, title: str, client: Client | None = None) -> None:
    """Download a file of any size to `target`, with a progress bar titled `title`; what an earlier call got is not asked for.

    Raises:
        Gone: it is not there.
        Unreachable: attempt after attempt brought next to nothing; what has come is kept for the next call.
        UserError: the disk has not as many bytes as the file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    client, part, failures = client or Client(), _Part(target, url), 0
    with progress(None, total=0, title=title, unit="B") as bar:
        while True:
            before = part.num_bytes()
            try:
                _append(client, part, bar)
                break
            except TransientError as error:
                failures = 1 if part.num_bytes() - before >= CHUNK else failures + 1
                if failures >= client.attempts:
                    kept = f"{part.num_bytes():,} bytes are kept"
                    raise TransientError(
                        f"{error} (given up after {failures} attempts; {kept} in {part.path})"
                    ) from error
                time.sleep(client.wait_s(failures, error))
    part.path.replace(target)
    part.forget()
