"""What a web server can do wrong is survived, or named, and over in time."""

import time
from base64 import b64encode
from contextlib import contextmanager
from email.utils import formatdate

import pytest

from data.fetch.address import redirected
from data.fetch.http import Client, NotFoundError, TransientError
from tests.helpers.server import Server, client
from vzip import UserError

CONTENT = bytes(range(256)) * 40


@contextmanager
def serving(folder, faults=None, *, content=CONTENT, **options):
    """A server of one file, a.bin, with a list of faults one after the other, or one for ever."""
    (folder / "a.bin").write_bytes(content)
    with Server(folder, {"/a.bin": faults}, **options) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_files_and_parts_of_them_come_over_one_connection(tmp_path):
    with serving(tmp_path) as server:
        here = client()
        url = f"{server.url}/a.bin"
        assert here.get(url) == CONTENT
        assert here.get(url, first=5, last=5) == CONTENT[5:6]
        assert here.get(url, first=1000, last=len(CONTENT) - 1) == CONTENT[1000:]
        assert here.size(url) == len(CONTENT)

        assert server.num_connections == 1
        assert server.ranges[1:] == [(5, 5), (1000, len(CONTENT) - 1), (0, 0)]


@pytest.mark.parametrize(
    "fault", ["drop", "truncate", "503", "429", pytest.param("stall", marks=pytest.mark.slow)]
)
def test_faults_are_tried_again_and_those_that_do_not_pass_are_transient_errors(tmp_path, fault):
    here = client(read_s=1.0 if fault == "stall" else 30.0)
    with serving(tmp_path, [fault, fault, None, fault, "short"]) as server:
        assert here.get(f"{server.url}/a.bin") == CONTENT
        assert here.get(f"{server.url}/a.bin", first=100, last=7000) == CONTENT[100:7001]
        assert server.requests["/a.bin"] == 6

    with serving(tmp_path, fault) as server:
        with pytest.raises(TransientError, match=rf"{server.url}/a.bin: .*given up after 3 attempts"):
            here.get(f"{server.url}/a.bin")
        assert server.requests["/a.bin"] == 3


@pytest.mark.parametrize(("fault", "words"), [("404", "answered 404"), ("loop", "too many redirects")])
def test_a_missing_file_is_not_asked_for_again(tmp_path, fault, words):
    with serving(tmp_path, fault) as server:
        with pytest.raises(NotFoundError, match=words):
            client().get(f"{server.url}/a.bin")
        assert server.requests["/a.bin"] == (6 if fault == "loop" else 1)


BAD_ADDRESSES = {
    "http://[::1": "which is not an address",
    "http://a..b/": "a..b",
    "http://a:port/": "which is not an address",
    "http://": "too many redirects",
    "ftp://127.0.0.1/a": "is not a web address",
    "file:///etc/hostname": "is not a web address",
}


@pytest.mark.parametrize(("address", "words"), BAD_ADDRESSES.items())
def test_other_addresses_than_of_the_web_are_not_found_nor_followed(tmp_path, address, words):
    with pytest.raises(NotFoundError):
        client(attempts=1).get(address)
    with serving(tmp_path, f"to {address}") as server:
        with pytest.raises(NotFoundError, match=words):
            client().get(f"{server.url}/a.bin")


def test_a_redirect_never_leaves_encryption():
    assert redirected("http://a/b", "https://c/d") == "https://c/d"
    assert redirected("https://a/b", "/d?e=f") == "https://a/d?e=f"
    assert redirected("https://a/b", "//c/d") == "https://c/d"
    with pytest.raises(ValueError, match=r"from https to http .http://c/d.key=\*\*\*"):
        redirected("https://a/b", "http://c/d?key=s3cret")


def test_a_login_goes_to_its_own_host_only_and_a_part_is_asked_for_after_a_redirect(tmp_path):
    with serving(tmp_path) as other, serving(tmp_path, [None, f"to {other.url}/a.bin", "302"]) as server:
        url = server.url.replace("http://", "http://me:s3%40cret@") + "/a.bin"
        for _ in range(3):
            assert client().get(url, first=7, last=9) == CONTENT[7:10]

        sent = f"Basic {b64encode(b'me:s3@cret').decode()}"
        assert server.logins == {"/a.bin": sent, "/moved/a.bin": sent}
        assert other.logins == {"/a.bin": None}

        # The login of a redirect is not sent.
        with serving(tmp_path, f"to {other.url.replace('//', '//me:word@')}/a.bin") as third:
            assert client().get(f"{third.url}/a.bin") == CONTENT
        assert other.logins == {"/a.bin": None}


def test_errors_name_the_address_without_its_secrets(tmp_path):
    with serving(tmp_path, "404") as server:
        url = server.url.replace("http://", "http://me:s3cret@") + "/a.bin?sig=s3cret"
        address = r"http://\*\*\*@.*/a\.bin\?sig=\*\*\*"
        with pytest.raises(NotFoundError, match=f"{address}: answered 404") as error:
            client().get(url)
    assert "s3cret" not in str(error.value)

    # A server that is gone, and a host that does not exist.
    for gone in (url, "http://me:s3cret@nowhere.invalid/a.bin?sig=s3cret"):
        with pytest.raises(TransientError, match=address) as error:
            client(attempts=1).get(gone)
        assert "s3cret" not in str(error.value)


def test_a_server_that_sends_no_parts_or_other_parts_is_named(tmp_path):
    with serving(tmp_path, "whole", content=bytes(4_000_000)) as server:
        for ask in (lambda url: client().get(url, first=0, last=9), client().size):
            with pytest.raises(NotFoundError, match="sends no parts of files"):
                ask(f"{server.url}/a.bin")
        assert server.requests["/a.bin"] == 2

    with serving(tmp_path, "shifted") as server:
        with pytest.raises(NotFoundError, match="sends from byte 2 where 1"):
            client().get(f"{server.url}/a.bin", first=1, last=9)


@pytest.mark.parametrize("fault", [None, "short", "endless"])
def test_a_file_that_is_too_large_for_a_picture_is_refused(tmp_path, fault):
    with serving(tmp_path, fault, content=bytes(1_000_000)) as server:
        with pytest.raises(NotFoundError, match=r"100,000"):
            client(max_bytes=100_000).get(f"{server.url}/a.bin")
        assert server.requests["/a.bin"] == 1


@pytest.mark.parametrize(
    ("fault", "ask"), [("trickle", Client.get), ("header", Client.get), ("header", Client.size)]
)
def test_a_byte_now_and_then_is_not_waited_for_for_ever(tmp_path, fault, ask):
    with serving(tmp_path, fault, trickle_s=0.01) as server:  # the whole file would take 102 s
        with pytest.raises(TransientError, match="sent too little in 0"):
            ask(client(total_s=0.5), f"{server.url}/a.bin")
        assert server.requests["/a.bin"] == 1


def test_a_proxy_whose_header_never_ends_is_given_up(tmp_path, monkeypatch):
    def answer(handler):
        handler._send_endlessly(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.1)

    with serving(tmp_path) as server:
        monkeypatch.setenv("https_proxy", server.url)
        monkeypatch.setattr("tests.helpers.server._Handler.do_CONNECT", answer, raising=False)
        with pytest.raises(TransientError, match="sent too little in 1 s"):
            client(total_s=1).get("https://far.invalid/a.bin")


def test_a_connection_is_as_patient_as_before_after_a_deadline(tmp_path):
    """A short deadline of one request does not shorten the timeout of the next one."""
    with serving(tmp_path, delay_s=0.5) as server:
        here = client(total_s=20)
        assert here.get(f"{server.url}/a.bin") == CONTENT
        here.total_s = 180
        assert here.get(f"{server.url}/a.bin") == CONTENT
        assert server.num_connections == 1


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "is_date"), [("429", False), ("503", True)])
def test_a_server_says_how_long_to_wait(tmp_path, fault, is_date):
    retry_after = formatdate(time.time() + 1.9, usegmt=True) if is_date else "1"
    with serving(tmp_path, [fault], retry_after=retry_after) as server:
        start = time.monotonic()
        assert client().get(f"{server.url}/a.bin") == CONTENT
        assert time.monotonic() - start > 0.4


def test_a_server_that_asks_for_nonsense_or_a_day_is_not_waited_for(tmp_path):
    with serving(tmp_path, ["503"], retry_after="soon") as server:
        assert client().get(f"{server.url}/a.bin") == CONTENT

    with serving(tmp_path, ["429"], retry_after="86400") as server:
        with pytest.raises(TransientError, match="429"):
            client(total_s=50).get(f"{server.url}/a.bin")
        assert server.requests["/a.bin"] == 1


def test_waits_double_spread_and_end():
    here = Client()

    def waits(failures):
        return [here.wait_s(failures, TransientError("")) for _ in range(50)]

    assert all(0.5 <= wait <= 1.5 for wait in waits(1))
    assert all(2 <= wait <= 6 for wait in waits(3))
    assert len(set(waits(2))) > 10
    assert set(waits(20)) == {60.0}
    assert here.wait_s(1, TransientError("", wait_s=7.5)) == 7.5


def test_the_environments_proxy_is_used_but_for_hosts_without(tmp_path, monkeypatch):
    with serving(tmp_path) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("http://", "http://user:word@"))
        assert client().get("http://far.invalid/a.bin") == CONTENT

        monkeypatch.setenv("no_proxy", "far.invalid")
        with pytest.raises(TransientError):
            client(attempts=1).get("http://far.invalid/a.bin")
        assert proxy.requests["/a.bin"] == 1

    for proxy in ("socks5://me:s3cret@127.0.0.1:1", "me:s3/cret@host:1"):
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(UserError, match=r"http_proxy=\w+://\*\*\*@") as error:
            Client()
        assert "s3" not in str(error.value)
