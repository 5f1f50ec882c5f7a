"""A server is started, found ready, asked, and ended with all of its processes."""

import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from scripts.serve.main import with_log
from scripts.serve.request import example_request
from scripts.serve.server import ServerError, read_page, serving, unused_port
from tests.helpers.chat_server import start_chat_server


@pytest.fixture
def python(tmp_path):
    """A Python that starts the stand-in whatever module it is told to run."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -m tests.helpers.chat_server "$@"\n')
    path.chmod(0o755)
    return path


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_server_and_its_workers_end_with_the_block(python, tmp_path):
    log = tmp_path / "log"
    with serving(python, "model", model="it", log=log) as server:
        assert read_page(server.address, "/health") == ""
        assert read_page(server.address, "/nosuch") is None
        worker = int(log.read_text().split()[1])
        assert is_alive(worker)

    assert server.process.returncode is not None
    assert read_page(server.address, "/health") is None

    # init collects the worker a moment later.
    deadline = time.monotonic() + 30
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


@pytest.mark.slow
def test_a_server_that_ends_by_itself_is_explained_by_its_log(python, tmp_path):
    log = tmp_path / "log"
    with pytest.raises(ServerError) as caught, serving(python, "broken", model="it", log=log):
        pass
    assert str(with_log(caught.value, log)) == f"format 2 is unknown\nThe whole log is {log}"

    log.write_text("out of memory\n")
    message = str(with_log(caught.value, log))
    assert "ended with code 1" in message and "out of memory" in message


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"--port={port} can't be opened"):
            unused_port("127.0.0.1", port)
    with pytest.raises(ServerError, match="port=70000"):
        unused_port("127.0.0.1", 70000)


@pytest.mark.parametrize(("budgets", "asked"), [([8], None), ([64, 128], {"budget": 128})])
def test_the_printed_request_can_be_copied(tmp_path, budgets, asked):
    # Longer than an argument of a command may be.
    (tmp_path / "PICTURE.png").write_bytes(os.urandom(300_000))
    listener = start_chat_server()
    address = f"http://127.0.0.1:{listener.server_port}"
    command = example_request(SimpleNamespace(address=address, model="it's; $HOME"), budgets)

    hidden = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=hidden, capture_output=True, check=True)
    listener.shutdown()
    assert b"circle" in done.stdout
    (question,) = listener.questions
    assert question["model"] == "it's; $HOME"
    assert question.get("mm_processor_kwargs") == asked
    url = question["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,") and len(url) > 400_000
