"""Fetch one file of any size.

Files on the Hugging Face hub are fetched with the hub's own client, all others by plain HTTP.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError

from data.fetch.http import Client, NotFoundError, TransientError
from data.progress import progress
from vzip.files import atomic_write

ENDPOINTS = (constants.ENDPOINT, "https://huggingface.co")
"""Addresses of the hub: `$HF_ENDPOINT`, which may name a mirror, and the hub's own address."""
HUB_PATH = re.compile(r"/+(?:(datasets|spaces)/)?((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)")
"""Path of a file on the hub: (type of the repository), its name, revision, file."""


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the Hugging Face hub, with the arguments of `hf_hub_download`."""

    endpoint: str
    repo_type: str
    repo_id: str
    revision: str
    filename: str


def parse_hub_address(url: str) -> HubFile | None:
    """Return the file that an address of the hub names. None for other addresses."""
    for endpoint in ENDPOINTS:
        if not url.startswith(f"{endpoint}/"):
            continue

        # The hub's web pages link files as `...?download=true`.
        path, _, _ = url.removeprefix(endpoint).partition("?")
        # The hub's client wants the plain names, and an address has them quoted.
        match = HUB_PATH.fullmatch(path)
        if match:
            kind, repo_id, revision, filename = match.groups()
            repo_type = kind.removesuffix("s") if kind else "model"
            return HubFile(endpoint, repo_type, repo_id, unquote(revision), unquote(filename))

    return None


def _download_from_hub(file: HubFile, target: Path) -> None:
    """Download with the hub's client, which sends the user's token.

    The client continues after a broken connection while this command runs. The next command starts
    the file again.
    """
    # The client keeps records beside the file, so it gets a folder of its own. A killed command
    # leaves this folder, but the client never continues a download of another process.
    folder = target.with_name(f"{target.name}.download")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        path = hf_hub_download(
            file.repo_id,
            file.filename,
            repo_type=file.repo_type,
            revision=file.revision,
            endpoint=file.endpoint,
            local_dir=folder,
        )
        # Only a whole file gets here, so a file at `target` is always whole.
        Path(path).replace(target)
    except LocalEntryNotFoundError as error:
        # The error itself only says that the cache has no copy. Its cause says why the hub failed.
        raise TransientError(_one_line(error.__cause__ or error)) from error
    except Exception as error:
        # The client raises errors of its own, of its HTTP library, and of its storage backend.
        raise NotFoundError(_one_line(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _one_line(error: BaseException) -> str:
    # The hub's errors have several lines and links, and some errors have no text at all.
    words = str(error).split() or [type(error).__name__]
    return " ".join(words)


def fetch_file(url: str, target: Path, *, client: Client | None = None) -> None:
    """Download a file of any size to `target`, whole or not at all, with a progress bar.

    A command that was ended in the middle leaves nothing: the next one starts the file again.

    Args:
        url: its address, on the Hugging Face hub (`.../resolve/REVISION/FILE`) or elsewhere.
        target: path of the downloaded file.
        client: client for addresses outside the hub.

    Raises:
        NotFoundError: the file is missing, or the user may not read it.
        TransientError: the server did not answer.
        UserError: the disk is too small for the file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)

    # The hub's client sends the user's token, without which some files can't be read.
    hub_file = parse_hub_address(url)
    if hub_file is not None:
        _download_from_hub(hub_file, target)
        return

    client = client or Client()
    bar = progress(None, total=0, title=target.name, unit="B")
    # An attempt that breaks off starts the file again, in the same scratch file.
    with atomic_write(target) as scratch, bar:
        client.download(url, scratch, bar=bar)
