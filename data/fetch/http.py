"""Fetch files, and parts of files, over HTTP.

A request is repeated if that can help, and ends at a deadline. A file comes whole or not at all.
"""

import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.request import getproxies, proxy_bypass

from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Retry, Timeout
from urllib3.exceptions import HTTPError, InvalidHeader, LocationValueError
from urllib3.util import parse_url

from data.fetch.address import Origin, basic_login, origin, redirected, split_login
from data.fetch.deadline import Deadline, applied, with_deadlines
from vzip import UserError
from vzip.redact import redacted

T = TypeVar("T")

CHUNK = 1 << 20
"""Bytes that are read at once."""
MAX_WAIT_S = 60.0
"""Longest wait between two attempts, even if a server asks for more."""
MAX_REDIRECTS = 5
MAX_REDIRECT_BODY = 1 << 16
"""Bytes behind a redirect that are read, to use the connection again."""
HEADERS = {"User-Agent": "vzip", "Accept-Encoding": "identity"}
MAX_CONNECTIONS = 64


class NotFoundError(OSError):
    """A source does not have the file, or sends something unusable. Asking again does not help.

    Messages are recorded, so secrets in addresses are taken out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class TransientError(OSError):
    """A source gave no proper answer, but may give one later.

    It refused or dropped the connection, stalled, broke off, or answered 408, 425, 429 or 5xx.

    Attributes:
        wait_s: seconds that the server asked to wait.
    """

    def __init__(self, message: str, *, wait_s: float = 0.0) -> None:
        super().__init__(redacted(message))
        self.wait_s = wait_s


def _manager(scheme: str) -> PoolManager:
    """Open connections for a scheme, through a proxy if the environment names one.

    The environment names proxies in `http_proxy` and `https_proxy`.
    """
    proxy = getproxies().get(scheme)
    if not proxy:
        return with_deadlines(PoolManager(maxsize=MAX_CONNECTIONS))

    # A proxy is often given as HOST:PORT.
    address = proxy if "://" in proxy else f"http://{proxy}"
    wrong = f"{scheme}_proxy={address} in the environment is not an http or https proxy; set one, or unset it"
    try:
        url = parse_url(address)
    except LocationValueError as error:
        raise UserError(wrong) from error
    if url.scheme not in ("http", "https"):
        raise UserError(wrong)

    login = {"Proxy-Authorization": basic_login(url.auth)} if url.auth else None
    proxy_url = url._replace(auth=None).url
    return with_deadlines(ProxyManager(proxy_url, proxy_headers=login, maxsize=MAX_CONNECTIONS))


def _requested_wait_s(response: BaseHTTPResponse) -> float:
    """Return the seconds that the header Retry-After asks for. 0 if it is missing or wrong."""
    try:
        return float(Retry().get_retry_after(response) or 0)
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


def content_range(response: BaseHTTPResponse, url: str) -> tuple[int, int]:
    """Return (first byte, bytes of the whole file) of an answer to a range request.

    Raises NotFoundError for any other answer.
    """
    # A server that ignores the range answers 200 and sends the whole file, maybe gigabytes.
    if response.status != 206:
        raise NotFoundError(
            f"{url}: sends no parts of files (HTTP ranges); download the whole file, and give its path"
        )

    header = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18})", header.strip())
    if not match:
        raise NotFoundError(f"{url}: sends a part of a file, but not which one (Content-Range: {header!r})")
    return int(match[1]), int(match[2])


def check_num_bytes(url: str, num_bytes: int, max_bytes: int) -> None:
    """Raise NotFoundError if a file has more bytes than are allowed."""
    if num_bytes > max_bytes:
        raise NotFoundError(f"{url}: has more than {max_bytes:,} bytes, which is not allowed")


def check_free_space(url: str, folder: Path, num_bytes: int) -> None:
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
    logins: Mapping[Origin, str] = field(default_factory=dict)
    """Headers that log in, by scheme, host and port of the servers that they are sent to."""

    def __post_init__(self) -> None:
        self._direct = with_deadlines(PoolManager(maxsize=MAX_CONNECTIONS))
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

        deadline = Deadline(self.total_s)

        def attempt() -> bytes:
            with self.answer(url, headers, deadline) as response:
                # Check the first byte, because a server may send another part.
                if headers:
                    start, _ = content_range(response, url)
                    if start != first:
                        raise NotFoundError(f"{url}: sends from byte {start} where {first} was asked for")
                data = self._read_body(response, url)

            # A short answer to a range request is no error for urllib3.
            if num_bytes not in (None, len(data)):
                raise TransientError(f"{url}: {len(data):,} bytes came for bytes {first:,} to {last:,}")
            return data

        return self.retry(attempt, deadline)

    def size(self, url: str) -> int:
        """Return the bytes of the file at an address. Its server must send parts of files.

        Raises the errors of `get`.
        """
        deadline = Deadline(self.total_s)

        def attempt() -> int:
            # Not HEAD: a signed address is valid for one method only.
            with self.answer(url, {"Range": "bytes=0-0"}, deadline) as response:
                _, num_bytes = content_range(response, url)
                return num_bytes

        return self.retry(attempt, deadline)

    @contextmanager
    def answer(self, url: str, headers: dict[str, str], deadline: Deadline) -> Iterator[BaseHTTPResponse]:
        """Ask once, and yield an answer of status 200 or 206 whose body is not read yet.

        Raises NotFoundError and TransientError, even for faults while the caller reads the body.
        """
        try:
            with applied(deadline):
                response = self._follow(url, headers, deadline)
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
        except HTTPError as error:
            # The library's messages begin with a connection: "HTTPSConnection(host='...', port=443): ".
            reason = re.sub(r"^\w+\(host=.*?\): ", "", str(error))
            if deadline.left_s() <= 0:
                reason = f"sent too little in {deadline.seconds:g} s"
            raise TransientError(f"{url}: {reason}") from error

    def _follow(self, url: str, headers: dict[str, str], deadline: Deadline) -> BaseHTTPResponse:
        """Ask for an address, and for those that the answers redirect to.

        This is the only place where redirects are followed.
        """
        # A login goes to the host of this address only, and never to one that a redirect names.
        first, login = split_login(url)
        login = login or self.logins.get(origin(first))
        address = first
        for _ in range(1 + MAX_REDIRECTS):
            sent = HEADERS | headers
            if login is not None and origin(address) == origin(first):
                sent["Authorization"] = login
            response = self._ask(address, sent, deadline)
            location = response.get_redirect_location()
            if not location:
                return response

            # Read a short body, so that the next request can use the connection again.
            response.read(MAX_REDIRECT_BODY)
            response.close()
            try:
                address = redirected(address, location)
            except ValueError as error:
                raise NotFoundError(f"{url}: {error}") from error

        raise NotFoundError(f"{url}: too many redirects")

    def _ask(self, address: str, headers: dict[str, str], deadline: Deadline) -> BaseHTTPResponse:
        """Make one request. Raises the errors of urllib3."""
        # A timeout must be positive. After the deadline, a millisecond fails just as well.
        left_s = max(deadline.left_s(), 0.001)
        # urllib3 repeats and follows nothing: the client also repeats requests whose body broke off.
        return self._manager_of(address).request(
            "GET",
            address,
            headers=headers,
            timeout=Timeout(connect=min(self.connect_s, left_s), read=min(self.read_s, left_s)),
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )

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

    def retry(self, attempt: Callable[[], T], deadline: Deadline | None = None) -> T:
        """Call `attempt` until it succeeds, and return its result. Give up at a deadline."""
        failures = 0
        while True:
            try:
                return attempt()
            except TransientError as error:
                # Give up if the wait alone would pass the deadline.
                failures += 1
                wait_s = self.wait_s(failures, error)
                is_over = deadline is not None and wait_s > deadline.left_s()
                if failures >= self.attempts or is_over:
                    raise TransientError(f"{error} (given up after {failures} attempts)") from error
            time.sleep(wait_s)

    def _read_body(self, response: BaseHTTPResponse, url: str) -> bytes:
        """Read the body of an answer. Raise an error if it is too large."""
        # The server may say the size before it sends anything.
        check_num_bytes(url, response.length_remaining or 0, self.max_bytes)
        data = bytearray()
        while chunk := response.read1(CHUNK):
            data += chunk
            check_num_bytes(url, len(data), self.max_bytes)
        return bytes(data)
