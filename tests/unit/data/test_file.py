"""One file comes whole or not at all, and only as long as bytes keep coming."""

import shutil
import time
from collections import namedtuple

import pytest
from huggingface_hub import constants

from data.fetch import deadline
from data.fetch import file as fetching
from data.fetch.file import fetch_file, hub_logins
from data.fetch.http import NotFoundError, TransientError
from tests.helpers.server import Server, client
from vzip import UserError

CONTENT = bytes(range(256)) * 40
HUB_ADDRESS = "datasets/liuhaotian/LLaVA/resolve/main/mix.json"


@pytest.fixture
def published(tmp_path):
    """A folder with mix.json."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "mix.json").write_bytes(CONTENT)
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "mine" / "b.json"


def files_in(folder):
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def as_hub(monkeypatch):
    """Makes a server the hub, as HF_ENDPOINT does in a new process."""

    def use(server):
        monkeypatch.setattr(fetching, "ENDPOINTS", (server.url,))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        return f"{server.url}/{HUB_ADDRESS}"

    return use


def test_the_users_token_goes_to_the_hub_and_nowhere_else(published, target, as_hub):
    with (
        Server(published) as other,
        Server(published, {f"/{HUB_ADDRESS}": f"to {other.url}/mix.json"}) as hub,
    ):
        fetch_file(as_hub(hub), target)
        assert hub.logins == {f"/{HUB_ADDRESS}": "Bearer hf_mine"}
        assert other.logins == {"/mix.json": None}

        target.unlink()
        fetch_file(f"{other.url}/mix.json", target, client=client(logins=hub_logins()))
        assert other.logins == {"/mix.json": None}

    assert target.read_bytes() == CONTENT
    assert files_in(target.parent) == ["b.json"]


def test_a_hub_that_may_not_be_asked_is_not(published, target, as_hub, monkeypatch):
    with Server(published) as hub:
        address = as_hub(hub)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(NotFoundError, match="HF_HUB_OFFLINE=1"):
            fetch_file(address, target)
        assert not hub.requests


def test_a_file_that_changes_between_attempts_is_fetched_anew(published, target):
    class Changing(Server):
        def begin(self, path):
            fault = "truncate" if not self.requests[path] else None
            (self.folder / "mix.json").write_bytes(CONTENT if fault else CONTENT[::-1])
            super().begin(path)
            return fault

    with Changing(published) as server:
        fetch_file(f"{server.url}/mix.json", target, client=client())
        assert server.ranges == [(0, 10239), (0, 10239)]

    assert target.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(
    ("faults", "starts"),
    [
        ([], [0]),
        (["drop"], None),  # of what was sent, a part is lost
        (["truncate", "503"], [0, 5120]),
        (["truncate", "truncate"], [0, 5120, 7680]),
        (["truncate", "whole"], [0, 0]),  # a server that sends no parts
        (["302"], [0]),
    ],
    ids=str,
)
def test_an_attempt_goes_on_where_the_last_one_broke_off(published, target, faults, starts):
    with Server(published, {"/mix.json": faults}) as server:
        fetch_file(f"{server.url}/mix.json", target, client=client())
        assert starts is None or [first for first, _ in server.ranges] == starts

    assert target.read_bytes() == CONTENT
    assert files_in(target.parent) == ["b.json"]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("404", NotFoundError, "answered 404"),
        ("truncate", TransientError, r"bytes came|IncompleteRead"),
        ("503", TransientError, r"answered 503.*given up after 3 attempts"),
    ],
)
def test_nothing_half_is_left(published, target, fault, error, words):
    with Server(published, {"/mix.json": fault}) as server:
        with pytest.raises(error, match=words):
            fetch_file(f"{server.url}/mix.json", target, client=client())

    assert files_in(target.parent) == []


@pytest.mark.parametrize(
    ("free", "fault", "words"),
    [(1_000, None, r"needs 10,240 bytes .* 1,000 are free"), (10**9, "short", r"1,000,000,000 are free")],
    ids=["a file of known size", "of unknown size"],
)
def test_a_file_leaves_room_on_the_disk(published, target, monkeypatch, free, fault, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free))
    with Server(published, {"/mix.json": fault}) as server:
        with pytest.raises(UserError, match=words):
            fetch_file(f"{server.url}/mix.json", target)
    assert files_in(target.parent) == []


@pytest.mark.parametrize("fault", ["endless", None])
def test_a_file_that_is_too_large_or_never_ends_is_refused(published, target, monkeypatch, fault):
    monkeypatch.setattr(fetching, "MAX_BYTES", 10_000)
    with Server(published, {"/mix.json": fault}) as server:
        with pytest.raises(NotFoundError, match=r"more than 10,000 bytes"):
            fetch_file(f"{server.url}/mix.json", target, client=client())
        assert server.requests == {"/mix.json": 1}
    assert files_in(target.parent) == []


@pytest.mark.parametrize("fault", ["header", "trickle"])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(published, target, fault):
    """The whole file would take 102 s, and the header would never end."""
    with Server(published, {"/mix.json": fault}, trickle_s=0.01) as server:
        with pytest.raises(TransientError, match=r"sent too little in 1 s .given up after 2 attempts"):
            fetch_file(f"{server.url}/mix.json", target, client=client(total_s=1, attempts=2))
    assert files_in(target.parent) == []


def test_a_file_that_keeps_coming_may_take_hours(published, target, monkeypatch):
    """The clock of the client goes an hour ahead with each part that it has read."""
    now = time.monotonic
    hours = []
    monkeypatch.setattr(deadline.time, "monotonic", lambda: now() + 3600 * len(hours))
    monkeypatch.setattr(fetching, "MIN_PROGRESS", 1)
    monkeypatch.setattr(fetching, "check_num_bytes", lambda *_: hours.append(1))
    (published / "mix.json").write_bytes(bytes(3_000_000))
    with Server(published) as server:
        fetch_file(f"{server.url}/mix.json", target, client=client(total_s=4000))

    assert target.stat().st_size == 3_000_000
    assert len(hours) > 3


def test_a_file_that_is_refused_never_gets_its_name(published, target):
    def refuse(path):
        assert path.read_bytes() == CONTENT
        raise NotFoundError("it is a web page")

    with Server(published) as server:
        with pytest.raises(NotFoundError, match="web page"):
            fetch_file(f"{server.url}/mix.json", target, check=refuse)
    assert files_in(target.parent) == []
