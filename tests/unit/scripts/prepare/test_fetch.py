"""Whatever a server sends in place of the instruction file is refused, and a bad file names its cure."""

import gzip
import json
import subprocess
import sys

import pytest

from scripts.prepare.fetch import check_examples, check_instructions, fetch_instructions
from tests.conftest import ROOT
from tests.helpers import mix
from tests.helpers.commands import environment
from tests.helpers.server import Server, client
from vzip import UserError

GOOD = json.dumps(
    [{"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 30
).encode()
LINES = b"\n".join(json.dumps(row).encode() for row in json.loads(GOOD))
NOT_INSTRUCTIONS = {
    "page": (b"\n<!DOCTYPE html><html>Log in</html>", "a web page"),
    "empty": (b"", "it is empty"),
    "white": (b" \n", "it is empty"),
    "gzip": (gzip.compress(GOOD), "packed with gzip"),
    "zip": (b"PK\x03\x04...", "a zip file"),
    "cut": (GOOD[:-100], "its end is missing"),
    "cut line": (LINES[:-7], "its end is missing"),
    "other": (b"\xff\xfe[\0", "not with a JSON list"),
}


@pytest.fixture(autouse=True)
def _own_data(tmp_path, monkeypatch):
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "vzip"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("kind", NOT_INSTRUCTIONS)
def test_what_is_no_instruction_file_is_not_kept(tmp_path, kind):
    content, words = NOT_INSTRUCTIONS[kind]
    (tmp_path / "published.json").write_bytes(content)
    target = tmp_path / "my data" / "mix.json"
    with Server(tmp_path) as server:
        address = f"{server.url}/published.json"
        with pytest.raises(UserError, match=rf"(?s)data\.address={address} could not be fetched: .*{words}"):
            fetch_instructions(address, target, client())
        assert not target.exists()

        # The same command works as soon as the server does.
        (tmp_path / "published.json").write_bytes(GOOD)
        fetch_instructions(address, target, client())

    assert target.read_bytes() == GOOD
    check_examples(target, address)


@pytest.mark.parametrize("content", [GOOD, b"\xef\xbb\xbf " + GOOD + b"\n\n", LINES, LINES + b"\r\n", b"[]"])
def test_instruction_files_of_any_form_are_taken(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    check_instructions(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"<html>", b'{"error": "no"}', b"", GOOD[:-100]])
def test_a_bad_file_that_is_there_names_the_cure(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"came from data\.address=http://a/\?k=\*\*\*, delete it and run"):
        check_examples(tmp_path / "a.json", "http://a/?k=s3cret")
    with pytest.raises(UserError) as error:
        check_examples(tmp_path / "a.json", None)
    assert "data.address" not in str(error.value)


def test_a_data_file_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with Server(tmp_path) as server:
        with pytest.raises(UserError, match=r"data\.path=.*can't be written: File exists; set data\.path"):
            fetch_instructions(f"{server.url}/file", tmp_path / "file" / "mix.json", client())


NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")


def can_make_namespaces():
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not can_make_namespaces(), reason="needs the right to make PID namespaces")
def test_two_containers_that_share_a_disk_fetch_the_same(tmp_path):
    """Two namespaces have processes of the same numbers, and each sees none of the other's."""
    mix.save_mix(tmp_path, 80)
    with Server(tmp_path / "published", delay_s=0.02) as server:
        command = [*NAMESPACE, sys.executable, "-m", "scripts.prepare.fetch"]
        command += ["model=llava-7b", *mix.settings(server.url, tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes = [subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) for _ in range(2)]
        outputs = [process.communicate()[0].decode() for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    hashes = {line for output in outputs for line in output.splitlines() if line.startswith("hash ")}
    assert len(hashes) == 1
    assert not list(tmp_path.rglob("*.vzip-tmp"))
