"""Servers that misbehave, on loopback."""

import io
import json
import random
import time
from unittest.mock import patch

from data.fetch import file as fetching
from data.fetch.file import fetch_file
from data.fetch.http import NotFoundError, TransientError
from scripts.prepare.fetch import check_instructions
from tests.faults.world import World, check_end, module
from tests.helpers import tiny
from tests.helpers.server import Server, client
from vzip import UserError
from vzip.pictures import open_picture

FAULTS = [
    "header",
    "trickle",
    "endless",
    "html",
    "loop",
    "drop",
    "truncate",
    "short",
    "stall",
    "404",
    "429",
    "503",
    "to http://[::1",
    "to file:///etc/passwd",
    "to http://nowhere.invalid/x",
    "to ftp://127.0.0.1/x",
    "to ",
]

MOST_S = 60
"""Seconds after which a server has held a command for too long."""


def servers(world: World, rng: random.Random, number: int) -> None:
    """Fetch a file, a picture and an instruction file from a server with one fault."""
    fault = FAULTS[number % len(FAULTS)]
    world.description = f"fault {fault!r}"
    folder = world.folder / f"server-{number}"
    folder.mkdir()
    content = json.dumps([{"id": rng.randrange(10**9)} for _ in range(1000)]).encode()
    (folder / "train.json").write_bytes(content)
    buffer = io.BytesIO()
    tiny.picture(number).save(buffer, "PNG")
    picture = buffer.getvalue()
    (folder / "a.png").write_bytes(picture)
    with Server(folder, lambda path: fault, trickle_s=0.2) as server:
        _fetch(server, folder, content)
        _fetch_picture(server, picture)
        if fault in ("html", "404"):
            _make_data(world, server, number)


def _fetch(server, folder, content):
    """Fetch a file, whole or not at all."""
    target = folder / "mine" / "train.json"
    start = time.monotonic()
    # A real file may have gigabytes.
    with patch.object(fetching, "MAX_BYTES", 10**7):
        try:
            fetch_file(f"{server.url}/train.json", target, check=check_instructions, client=_client())
        except (NotFoundError, TransientError, UserError):
            assert not target.exists(), "a file in spite of an error"
        else:
            got = target.read_bytes()
            assert got == content, f"{len(got)} bytes of another file"
    seconds = time.monotonic() - start
    assert seconds < MOST_S, f"held for {seconds:.0f} s"
    left = [path.name for path in target.parent.iterdir() if path != target]
    assert left == [], f"left behind: {left}"


def _fetch_picture(server, picture):
    """Fetch a picture into memory. Half a picture does not decode, and is replaced then."""
    start = time.monotonic()
    try:
        got = _client().get(f"{server.url}/a.png")
    except (NotFoundError, TransientError):
        pass
    else:
        is_whole = got == picture
        assert is_whole or not _decodes(got), f"{len(got)} bytes of another picture"
    seconds = time.monotonic() - start
    assert seconds < MOST_S, f"held for {seconds:.0f} s"


def _decodes(content):
    try:
        open_picture(content)
    except (OSError, ValueError):
        return False
    return True


def _client():
    return client(total_s=4, read_s=1, attempts=2, max_bytes=10**6)


def _make_data(world, server, number):
    """Check that `make data` refuses the answer, and does not keep it as the instruction file."""
    target = world.folder / f"server-{number}" / "mine" / "train.json"
    changes = [f"data.path={target}", f"data.address={server.url}/train.json"]
    done = world.run(*module("scripts.prepare.fetch", *world.settings("data", *changes)))
    check_end(done, 2)
    assert not target.exists(), "the answer was kept as the instruction file"
