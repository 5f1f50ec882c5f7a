"""One file comes whole or not at all: from the hub with the hub's client, from other addresses by
plain HTTP.
"""

import shutil
from collections import namedtuple

import pytest
from huggingface_hub import constants

from data.fetch.file import HubFile, fetch_file, parse_hub_address
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


@pytest.fixture
def as_hub(monkeypatch):
    """Makes a server the hub, as HF_ENDPOINT does in a new process."""

    def use(server):
        monkeypatch.setattr("data.fetch.file.ENDPOINTS", (server.url,))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        return f"{server.url}/{HUB_ADDRESS}"

    return use


def files_in(folder):
    return [path.name for path in folder.iterdir()]


def test_addresses_of_the_hub(monkeypatch):
    monkeypatch.setattr("data.fetch.file.ENDPOINTS", ("http://mirror/hf", "https://huggingface.co"))
    expected = HubFile("http://mirror/hf", "dataset", "liuhaotian/LLaVA", "main", "mix.json")
    assert parse_hub_address(f"http://mirror/hf/{HUB_ADDRESS}") == expected
    assert parse_hub_address(f"http://mirror/hf//{HUB_ADDRESS}?download=true") == expected

    model = parse_hub_address("https://huggingface.co/gpt2/resolve/refs%2Fpr%2F1/a/b%20c.json")
    assert model == HubFile("https://huggingface.co", "model", "gpt2", "refs/pr/1", "a/b c.json")

    for other in ("https://huggingface.co/", "https://elsewhere/a/b/resolve/main/c", "http://mirror/hfx/a/b"):
        assert parse_hub_address(other) is None


def test_the_hubs_client_sends_the_users_token(published, target, as_hub):
    leftover = target.parent / "b.json.download"  # of a command that was killed
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"...")
    with Server(published, {f"/{HUB_ADDRESS}": ["truncate"]}) as server:
        fetch_file(as_hub(server), target)
        assert server.tokens == ["Bearer hf_mine"]

    assert target.read_bytes() == CONTENT
    assert files_in(target.parent) == ["b.json"]


def test_a_hub_without_an_answer_or_the_file_is_named(published, target, as_hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
    with Server(published) as server:
        address = as_hub(server)
    with pytest.raises(TransientError, match="refused"):
        fetch_file(address, target)

    with Server(published) as server:
        address = as_hub(server).replace("mix", "other")
        with pytest.raises(NotFoundError, match=r"404 .*Entry Not Found .*other\.json") as error:
            fetch_file(address, target)
    assert "\n" not in str(error.value)
    assert files_in(target.parent) == []


@pytest.mark.parametrize("faults", [[], ["drop"], ["truncate", "503"], ["302"]])
def test_other_addresses_are_tried_again(published, target, faults):
    with Server(published, {"/mix.json": faults}) as server:
        fetch_file(f"{server.url}/mix.json", target, client=client())

    assert target.read_bytes() == CONTENT
    assert files_in(target.parent) == ["b.json"]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("404", NotFoundError, "answered 404"),
        ("truncate", TransientError, r"5,120 of 10,240 bytes came|IncompleteRead"),
        ("503", TransientError, r"answered 503.*given up after 3 attempts"),
    ],
)
def test_nothing_half_is_left(published, target, fault, error, words):
    with Server(published, {"/mix.json": fault}) as server:
        with pytest.raises(error, match=words):
            fetch_file(f"{server.url}/mix.json", target, client=client())

    assert files_in(target.parent) == []


def test_a_disk_that_is_too_small_is_told_before(published, target, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 9_000, 1_000))
    with Server(published) as server:
        with pytest.raises(UserError, match=r"needs 10,240 bytes .* 1,000 are free"):
            fetch_file(f"{server.url}/mix.json", target)
