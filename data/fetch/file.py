"""Fetch one file of any size: it comes whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token
from tqdm import tqdm
from urllib3 import BaseHTTPResponse

from data.fetch.address import Origin, origin
from data.fetch.deadline import Deadline
from data.fetch.http import (
    CHUNK,
    Client,
    NotFoundError,
    TransientError,
    check_free_space,
    check_num_bytes,
    content_range,
)
from data.progress import progress
from vzip.files import atomic_write

ENDPOINTS = (constants.ENDPOINT, "https://huggingface.co")
"""Addresses of the hub: `$HF_ENDPOINT`, which may name a mirror, and the hub's own address."""
MAX_BYTES = 10_000_000_000
"""Largest file. LLaVA's own instruction file has 1 GB, and the largest public ones some GB."""
MIN_PROGRESS = 1 << 20
"""Bytes that must come within `Client.total_s`, again and again until the file is there."""
RESERVE = 1_000_000_000
"""Bytes that a file of unknown size leaves free on its disk, for everybody else."""


def hub_logins() -> dict[Origin, str]:
    """Return the header that sends the user's token, for each address of the Hugging Face hub."""
    # Some files of the hub can't be read without it.
    token = get_token()
    return {origin(endpoint): f"Bearer {token}" for endpoint in ENDPOINTS} if token else {}


class _Download:
    """The download of one file. A later attempt goes on where an earlier one broke off.

    Args:
        url: address of the file.
        path: where it is written.
        client: makes the requests.
        bar: shows the bytes that came.
    """

    def __init__(self, url: str, path: Path, client: Client, bar: "tqdm[Any]") -> None:
        self.url = url
        self.path = path
        self.client = client
        self.bar = bar
        # The server's name for this version of the file. Only with one can the rest be asked for.
        self.etag = ""

    def attempt(self) -> None:
        """Write the file, or what is missing of it. Raises the errors of `fetch_file`."""
        num_there = self.path.stat().st_size if self.etag and self.path.exists() else 0
        headers = {}
        if num_there:
            # If the file has changed, a server sends the whole new one.
            headers = {"Range": f"bytes={num_there}-", "If-Range": self.etag}

        try:
            self._ask(headers, num_there)
        except NotFoundError as error:
            # The file may be there although its rest is not: the next attempt asks for all of it.
            if not num_there:
                raise
            self.etag = ""
            raise TransientError(str(error)) from error

    def _ask(self, headers: dict[str, str], num_there: int) -> None:
        """Make one request, and write what comes."""
        deadline = Deadline(self.client.total_s)
        with self.client.answer(self.url, headers, deadline) as response:
            first, size = self._read_headers(response, num_there)
            # The file starts over: delete what an earlier attempt wrote, also to free its space.
            if not first:
                self.path.unlink(missing_ok=True)
            check_num_bytes(self.url, size or 0, MAX_BYTES)
            check_free_space(self.url, self.path.parent, (size or first) - first)
            self.bar.reset(total=size)
            self.bar.update(first)
            self._write(response, first, deadline)

        num_bytes = self.path.stat().st_size
        if size not in (None, num_bytes):
            raise TransientError(f"{self.url}: {num_bytes:,} of {size:,} bytes came")

    def _read_headers(self, response: BaseHTTPResponse, num_there: int) -> tuple[int, int | None]:
        """Return (number of an answer's first byte, size of the whole file). Remember its version."""
        # A weak version, W/"...", does not promise the same bytes.
        etag = response.headers.get("ETag", "")
        self.etag = "" if etag.startswith("W/") else etag
        if response.status != 206:
            return 0, response.length_remaining

        first, size = content_range(response, self.url)
        if first != num_there:
            raise NotFoundError(f"{self.url}: sends from byte {first} where {num_there} was asked for")
        return first, size

    def _write(self, response: BaseHTTPResponse, first: int, deadline: Deadline) -> None:
        """Write the body of an answer behind the bytes that are there."""
        has_size = response.length_remaining is not None
        num_bytes = first
        num_since = 0
        with self.path.open("ab") as file:
            while chunk := response.read1(CHUNK):
                num_bytes += len(chunk)
                # An answer without a size may never end, so look at each part of it.
                check_num_bytes(self.url, num_bytes, MAX_BYTES)
                if not has_size:
                    check_free_space(self.url, self.path.parent, len(chunk) + RESERVE)
                file.write(chunk)
                self.bar.update(len(chunk))

                # A server that sends enough may take hours.
                num_since += len(chunk)
                if num_since >= MIN_PROGRESS:
                    deadline.renew()
                    num_since = 0


def fetch_file(
    url: str,
    target: Path,
    *,
    check: Callable[[Path], None] = lambda path: None,
    client: Client | None = None,
) -> None:
    """Download a file of any size to `target`, whole or not at all, with a progress bar.

    A command that was ended in the middle leaves nothing: the next one starts the file again.

    Args:
        url: its address.
        target: path of the downloaded file.
        check: called with the path of the whole download, before it becomes `target`. What it
            raises withholds the file.
        client: client to use.

    Raises:
        NotFoundError: the file is missing or too large, or the user may not read it.
        TransientError: the server did not answer, or was too slow.
        UserError: the disk is too small for the file.
    """
    client = client or Client(logins=hub_logins())
    if constants.HF_HUB_OFFLINE and url.startswith(ENDPOINTS):
        raise NotFoundError(f"{url}: HF_HUB_OFFLINE=1 in the environment forbids asking the hub; unset it")

    target.parent.mkdir(parents=True, exist_ok=True)
    bar = progress(None, total=0, title=target.name, unit="B")
    with atomic_write(target) as scratch, bar:
        client.retry(_Download(url, scratch, client, bar).attempt)
        check(scratch)
