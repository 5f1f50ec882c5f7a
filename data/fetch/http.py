"""Fetch files, and parts of files, over HTTP.

A request is repeated if that can help, and ends at a deadline. A file comes whole or not at all.
"""

import math
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

from vzip import UserError

T = TypeVar("T")

CHUNK = 1 << 20
"""Bytes that are read at once."""
MAX_WAIT_S = 60.0
"""Longest wait between two attempts, even if a server asks for more."""
HEADERS = {"User-Agent": "vzip", "Accept-Encoding": "identity"}
# urllib3 only follows redirects. The client below repeats requests itself, because it also repeats
# those whose body breaks off.
REDIRECTS = Retry(
    total=None,
    connect=0,
    read=0,
    redirect=5,
    status=0,
    other=0,
    respect_retry_after_header=False,
)
MAX_CONNECTIONS = 64


class NotFoundError(OSError):
    """A source does not have the file, or sends something unusable. Asking again does not help."""


class TransientError(OSError):
    """A source gave no proper answer, but may give one later.

    It refused or dropped the connection, stalled, broke off, or answered 408, 425, 429 or 5xx.

    Attributes:
        wait_s: seconds that the server asked to wait.
    """

    def __init__(self, message: str, *, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def _manager(scheme: str) -> PoolManager:
    """Open connections for a scheme, through a proxy if the environment names one.

    The environment names proxies in `http_proxy` and `https_proxy`.
    """
    proxy = getproxies().get(scheme)
    if not proxy:
        return PoolManager(maxsize=MAX_CONNECTIONS)

    # A proxy is often given as HOST:PORT.
    url = parse_url(proxy if "://" in proxy else f"http://{proxy}")
    if url.scheme not in ("http", "https"):
        raise UserError(
            f"{scheme}_proxy={proxy} in the environment is not an http or https proxy; set one, or unset it"
        )

    login = make_headers(proxy_basic_auth=unquote(url.auth)) if url.auth else None
    return ProxyManager(url.url, proxy_headers=login, maxsize=MAX_CONNECTIONS)


def _requested_wait_s(response: BaseHTTPResponse) -> float:
    """Return the seconds that the header Retry-After asks for. 0 if it is missing or wrong."""
    try:
        return float(REDIRECTS.get_retry_after(response) or 0)
    except (InvalidHeader, ValueError, OverflowError):  # the last two: dates that no calendar has
        return 0.0


def _check_status(response: BaseHTTPResponse, url: str) -> None:
    """Raise TransientError or NotFoundError unless the answer has the file, or a part of it."""
    status = response.status
    if status in (200, 206):
        return

    # 408: the request took too long; 425: too early; 429: too many requests.
    message = f"{url}: answered {status} {response.reason or ''}".rstrip()
    if status >= 500 or status in (408, 425, 429):
        raise TransientError(message, wait_s=_requested_wait_s(response))
    raise NotFoundError(message)


def _content_range(response: BaseHTTPResponse, url: str) -> tuple[int, int]:
    """Return (first byte, bytes of the whole file) of an answer to a range request.

    Raises NotFoundError for any other answer.
    """
    # A server that ignores the range answers 200 and sends the whole file, maybe gigabytes.
    if response.status != 206:
        raise NotFoundError(
            f"{url}: sends no parts of files (HTTP ranges); download the whole file, and give its path"
        )

    header = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", header.strip())
    if not match:
        raise NotFoundError(f"{url}: sends a part of a file, but not which one (Content-Range: {header!r})")
    return int(match[1]), int(match[2])


def _check_free_space(url: str, folder: Path, num_bytes: int) -> None:
    """Raise UserError if a folder has no room for so many bytes."""
    # Better now than after an hour of download.
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"{url} needs {num_bytes:,} bytes in {folder}, and {free:,} are free there; free some space, "
            "or give another folder"
        )


@dataclass(eq=False)
class Client:
    """HTTP client with retries, timeouts and a total deadline.

    All threads should share one client, because it keeps connections open.
    """

    attempts: int = 5
    first_wait_s: float = 1.0
    """Wait before the second attempt.

    The wait doubles each time, up to `MAX_WAIT_S`, and is multiplied by a random 0.5 to 1.5.
    """
    connect_s: float = 10.0
    read_s: float = 30.0
    """Silence after which a server counts as stalled."""
    total_s: float = 180.0
    """Deadline for one picture, or one part of a file, with all attempts and waits.

    Without it, a server that sends a byte now and then would keep the client waiting for ever.
    """
    max_bytes: int = 100_000_000
    """Largest picture, or part of a file."""

    def __post_init__(self) -> None:
        self._direct = PoolManager(maxsize=MAX_CONNECTIONS)
        self._managers = {scheme: _manager(scheme) for scheme in ("http", "https")}

    def get(self, url: str, *, first: int | None = None, last: int | None = None) -> bytes:
        """Fetch the file at an address, or its bytes `first` to `last`, both included.

        Raises:
            NotFoundError: the file is missing or larger than `max_bytes`, or the server sends no
                parts of files.
            TransientError: all attempts failed.
        """
        # Without a range the size is not known, but `max_bytes` still limits it.
        headers = {}
        num_bytes = None
        if first is not None and last is not None:
            headers = {"Range": f"bytes={first}-{last}"}
            num_bytes = last - first + 1

        def attempt(deadline: float) -> bytes:
            with self.answer(url, headers, left_s=deadline - time.monotonic()) as response:
                # Check the first byte, because a server may send another part.
                if headers:
                    start, _ = _content_range(response, url)
                    if start != first:
                        raise NotFoundError(f"{url}: sends from byte {start} where {first} was asked for")
                data = self._read_body(response, url, deadline)

            # A short answer to a range request is no error for urllib3.
            if num_bytes not in (None, len(data)):
                raise TransientError(f"{url}: {len(data):,} bytes came for bytes {first:,} to {last:,}")
            return data

        return self._retry(attempt, total_s=self.total_s)

    def size(self, url: str) -> int:
        """Return the bytes of the file at an address. Its server must send parts of files.

        Raises the errors of `get`.
        """

        def attempt(deadline: float) -> int:
            # Not HEAD: a signed address is valid for one method only.
            with self.answer(url, {"Range": "bytes=0-0"}, left_s=deadline - time.monotonic()) as response:
                _, num_bytes = _content_range(response, url)
                return num_bytes

        return self._retry(attempt, total_s=self.total_s)

    def download(self, url: str, path: Path, *, bar: "tqdm[Any]") -> None:
        """Write the file at an address, of any size, to `path`.

        Each attempt starts the file again, and may take as long as bytes keep coming.

        Raises:
            NotFoundError: the file is missing.
            TransientError: all attempts failed.
            UserError: the disk is too small for the file.
        """

        def attempt(_deadline: float) -> None:
            # The bytes of an earlier attempt take space that this one needs.
            path.unlink(missing_ok=True)
            with self.answer(url, {}) as response:
                size = response.length_remaining
                _check_free_space(url, path.parent, size or 0)

                # The bar starts again with each attempt, because the file does.
                bar.reset(total=size)
                num_bytes = 0
                with path.open("wb") as file:
                    while chunk := response.read1(CHUNK):
                        file.write(chunk)
                        num_bytes += len(chunk)
                        bar.update(len(chunk))

            if size not in (None, num_bytes):
                raise TransientError(f"{url}: {num_bytes:,} of {size:,} bytes came")

        self._retry(attempt, total_s=math.inf)

    @contextmanager
    def answer(
        self, url: str, headers: dict[str, str], *, left_s: float = math.inf
    ) -> Iterator[BaseHTTPResponse]:
        """Ask once, and yield an answer of status 200 or 206 whose body is not read yet.

        Raises NotFoundError and TransientError, even for faults while the caller reads the body.
        """
        # A timeout must be positive. After the deadline, a millisecond fails just as well.
        left_s = max(left_s, 0.001)
        timeout = Timeout(connect=min(self.connect_s, left_s), read=min(self.read_s, left_s))
        try:
            response = self._manager_of(url).request(
                "GET",
                url,
                headers=HEADERS | headers,
                timeout=timeout,
                retries=REDIRECTS,
                preload_content=False,
                decode_content=False,
            )
            try:
                _check_status(response, url)
                yield response
            finally:
                # Close the connection of a body that was not read to its end. Otherwise the
                # connection has been given back already, and this does nothing.
                response.close()
        except (LocationValueError, UnicodeError) as error:
            # The text is not an address at all.
            raise NotFoundError(f"{url}: {error}") from error
        except MaxRetryError as error:
            # Too many redirects lead nowhere, so asking again does not help. All other causes are
            # connections that failed.
            kind = NotFoundError if isinstance(error.reason, ResponseError) else TransientError
            raise kind(f"{url}: {error.reason}") from error
        except HTTPError as error:
            raise TransientError(f"{url}: {error}") from error

    def wait_s(self, failures: int, error: TransientError) -> float:
        """Return the seconds to wait after so many failed attempts."""
        # The spread keeps threads that failed together from asking again together. It has a
        # generator of its own, because a run seeds the global one.
        spread = random.Random().uniform(0.5, 1.5)
        own_wait = self.first_wait_s * 2.0 ** (failures - 1) * spread
        return min(MAX_WAIT_S, max(error.wait_s, own_wait))

    def _manager_of(self, url: str) -> PoolManager:
        """Choose the connections for an address: through a proxy, or direct."""
        parts = parse_url(url)
        if parts.scheme not in self._managers:
            raise NotFoundError(f"{url} is not a web address (http://, https://)")
        # `no_proxy` in the environment names hosts that the proxy can't reach.
        if proxy_bypass(parts.host or ""):
            return self._direct
        return self._managers[parts.scheme]

    def _retry(self, attempt: Callable[[float], T], *, total_s: float) -> T:
        """Call `attempt` until it succeeds, and return its result.

        Its argument is the time by which it must be done (monotonic clock, seconds).
        """
        deadline = time.monotonic() + total_s
        failures = 0
        while True:
            try:
                return attempt(deadline)
            except TransientError as error:
                # Give up if the wait alone would pass the deadline.
                failures += 1
                wait_s = self.wait_s(failures, error)
                if failures >= self.attempts or time.monotonic() + wait_s > deadline:
                    raise TransientError(f"{error} (given up after {failures} attempts)") from error
            time.sleep(wait_s)

    def _read_body(self, response: BaseHTTPResponse, url: str, deadline: float) -> bytes:
        """Read the body of an answer. Raise an error if it is too large, or too slow."""
        # The server may say the size before it sends anything.
        length = response.length_remaining or 0
        if length > self.max_bytes:
            raise NotFoundError(f"{url}: has {length:,} bytes; at most {self.max_bytes:,} are allowed")

        # read1() returns the bytes that are there. read() would wait for a whole chunk, maybe past
        # the deadline.
        data = bytearray()
        while chunk := response.read1(CHUNK):
            data += chunk
            if len(data) > self.max_bytes:
                raise NotFoundError(f"{url}: has more than {self.max_bytes:,} bytes, which is not allowed")
            if time.monotonic() > deadline:
                raise TransientError(f"{url}: only {len(data):,} bytes came in {self.total_s:g} s")
        return bytes(data)
