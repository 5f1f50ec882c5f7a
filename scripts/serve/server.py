"""Start vLLM's OpenAI server for a folder, wait until it answers, and stop it.

This module imports nothing but the standard library, so that it also runs in `.venv-serve`.
"""

import http
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MODULE = "vllm.entrypoints.openai.api_server"

START_SECONDS = 1800
"""Most seconds until a server answers. A large model is read from a disk that may be slow."""

STOP_SECONDS = 60
"""Most seconds that a server may take to end."""

QUIT_SECONDS = 3
"""The same for one that has not answered yet, and does not listen while it compiles."""

ENVIRONMENT = {
    # vLLM sends statistics about its use unless it is told not to.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # On a CPU: GiB for keys and values. vLLM's own default is half of the memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class ServerError(RuntimeError):
    """The server does not start, refuses a request, or has ended."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    address: str
    """Such as http://127.0.0.1:8000."""
    model: str
    """The name that requests give."""
    log: Path
    """What the server prints."""
    process: subprocess.Popen[bytes]


def unused_port(host: str, port: int | None = None) -> int:
    """Return `port`, or any free one without it. Raises ServerError if it is taken."""
    # A server that listens there already would be taken for the new one.
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port or 0))
        except (OSError, OverflowError) as error:
            raise ServerError(
                f"--host={host} --port={port} can't be opened: {error}; give another one"
            ) from error
        return int(listener.getsockname()[1])


def read_page(address: str, path: str, *, seconds: float = 10) -> str | None:
    """Return a page of a server at http://HOST:PORT; None if it does not answer with one."""
    # http.client does not ask the network's proxy, which can't reach this machine.
    try:
        with closing(
            http.client.HTTPConnection(address.removeprefix("http://"), timeout=seconds)
        ) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            content = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None
    return content if response.status == http.HTTPStatus.OK else None


def _wait(server: Server) -> None:
    """Wait until the server answers. Raises ServerError if it ends, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while read_page(server.address, "/health") is None:
        if server.process.poll() is not None:
            raise ServerError(f"vLLM ended with code {server.process.returncode}")
        if time.monotonic() > deadline:
            raise ServerError(f"vLLM does not answer after {START_SECONDS} seconds")
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes], seconds: int) -> None:
    """End a server as Ctrl-C does, and its workers with it. Kill it if that takes longer."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    finally:
        # Who presses Ctrl-C again does not want to wait. The server has a group of its own, so
        # whatever is left of it can be found.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stop_on_signals() -> None:
    """Make this command end its server when its terminal closes, or when somebody kills it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


@contextmanager
def serving(
    python: Path,
    folder: Path | str,
    *,
    model: str,
    log: Path,
    options: Sequence[str] = (),
    address: tuple[str, int | None] = ("127.0.0.1", None),
) -> Iterator[Server]:
    """Run a server for the time of the `with` block.

    Args:
        python: the Python of an environment with vLLM.
        folder: the model.
        model: the name that requests give.
        log: the file for what the server prints.
        options: further options of vLLM.
        address: host and port; None is a free port.

    Raises:
        ServerError: the server does not start. The log says why.
    """
    host = address[0]
    port = unused_port(*address)
    command = [str(python), "-m", MODULE, "--model", str(folder), "--served-model-name", model]
    command += ["--host", host, "--port", str(port)]

    # Lets requests choose their budget. The plugin refuses all other settings of the processor.
    command += ["--trust-request-mm-kwargs", *options]

    # A session of its own: Ctrl-C reaches this process alone, which then ends the server in order.
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ},
            start_new_session=True,
        )
    server = Server(f"http://{host}:{port}", model, log, process)
    patience = QUIT_SECONDS
    try:
        _wait(server)
        patience = STOP_SECONDS
        yield server
    finally:
        _stop(process, patience)
