"""A real web server on loopback that serves a folder, and misbehaves as told: for tests of what downloads."""

import hashlib
import re
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.fetch.http import Client

FAULTS = (
    "drop",  # the connection is reset in the middle of the body
    "truncate",  # it is closed there, and the length was said
    "short",  # as well, and no length was said
    "stall",  # nothing more comes
    "trickle",  # a byte now and then
    "html",  # a page that says sorry, with status 200
    "whole",  # all of the file, whatever part was asked for
    "stale",  # a part, even if of another version than was asked for
    "shifted",  # another part than was asked for
    "302",  # to the same file, at /moved/...
    "loop",  # a redirect to itself
    "404",
    "429",
    "503",
)
MOVED = "/moved"
PAGE = b"<html><body>Sorry, this picture is not available.</body></html>"


def client(**settings):
    """One that waits little between its attempts, and long for an answer: of a busy machine that is no fault of the server's.

    Who tests a server that stalls gives a shorter `read_s`.
    """
    return Client(**{"attempts": 3, "first_wait_s": 0.01, **settings})


def seeded(faults, share, *, seed=0, times=1):
    """A plan by which a share of all paths have one of some faults, so many times; the same for a seed."""

    def plan(path):
        draw = hashlib.sha256(f"{seed}:{path}".encode()).digest()
        hit = int.from_bytes(draw[:4], "big") < share * 2**32 and not path.startswith(MOVED)
        return [faults[draw[4] % len(faults)]] * times if hit else []

    return plan


class Server:
    """`with Server(folder, plan) as server:` serves a folder's files at `server.url`, with ranges and ETags.

    `plan` gives the faults of a path ("/a/b.jpg"): a list is used up, request by request, a text holds for ever; it is a dict,
    or a function as `seeded` makes. `delay_s` is waited before each answer. A zip file may be served as any other file.
    """

    def __init__(self, folder, plan=None, *, delay_s=0.0, retry_after="0", trickle_s=0.05):
        self.folder, self.delay_s, self.retry_after, self.trickle_s = (
            Path(folder),
            delay_s,
            retry_after,
            trickle_s,
        )
        self.plan = (plan or {}).get if not callable(plan) else plan
        self.requests, self.ranges, self.sent = Counter(), [], Counter()
        self.max_concurrent, self.num_connections = 0, 0
        self._faults, self._concurrent, self._lock, self._closing = {}, 0, threading.Lock(), threading.Event()

    def __enter__(self):
        self._http = _Http(("127.0.0.1", 0), partial(_Handler, server_state=self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=partial(self._http.serve_forever, poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()  # wakes up those that stall
        self._http.shutdown()
        self._http.server_close()

    def pause(self, seconds):
        self._closing.wait(seconds)

    def begin(self, path):
        """Counts a request: its fault, or None."""
        with self._lock:
            self._concurrent += 1
            self.max_concurrent = max(self.max_concurrent, self._concurrent)
            self.requests[path] += 1
            faults = self._faults.setdefault(path, self.plan(path) or [])
            if isinstance(faults, str):
                return faults
            if faults:
                self._faults[path] = faults[1:]
                return faults[0]
            return None

    def end(self, path, num_bytes):
        with self._lock:
            self._concurrent -= 1
            self.sent[path] += num_bytes


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *arguments, server_state):
        self.state = server_state
        super().__init__(*arguments)

    def setup(self):
        super().setup()
        with self.state._lock:
            self.state.num_connections += 1

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.num_sent = 0
        fault = self.state.begin(path)
        try:
            self.state.pause(self.state.delay_s)
            self._answer(path, fault)
        finally:
            self.state.end(path, self.num_sent)

    def _head(self, status, length, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _write(self, data):
        self.wfile.write(data)
        self.num_sent += len(data)

    def _say(self, status, data=b"", **headers):
        self._head(status, len(data), **headers)
        self._write(data)

    def _answer(self, path, fault):
        if fault in ("404", "429", "503"):
            return self._say(
                int(fault), b"no", **({} if fault == "404" else {"Retry_After": self.state.retry_after})
            )
        if fault == "html":
            return self._say(200, PAGE, Content_Type="text/html")
        if fault == "302":
            return self._say(302, Location=f"{self.state.url}{MOVED}{self.path}")
        if fault == "loop":
            return self._say(302, Location=self.path)
        file = self.state.folder / path.removeprefix(MOVED).lstrip("/")
        if not file.is_file():
            return self._say(404, b"not found")
        return self._send_file(file, fault)

    def _send_file(self, file, fault):
        size, changed = file.stat().st_size, file.stat().st_mtime
        about = {
            "ETag": f'"{size}-{changed}"',
            "Last_Modified": formatdate(changed, usegmt=True),
            "Accept_Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        same = fault == "stale" or self.headers.get("If-Range", about["ETag"]) in (
            about["ETag"],
            about["Last_Modified"],
        )
        first, last, status = 0, size - 1, 200
        if asked and same and fault != "whole":
            first, last, status = int(asked[1]), min(int(asked[2] or size), size - 1), 206
            if first >= size:
                return self._say(416, Content_Range=f"bytes */{size}")
            first += fault == "shifted"
            about["Content_Range"] = f"bytes {first}-{last}/{size}"
        self.state.ranges.append((first, last))
        with file.open("rb") as opened:
            opened.seek(first)
            data = opened.read(last - first + 1)
        self._head(status, None if fault == "short" else len(data), **about)
        return self._send(data, fault)

    def _send(self, data, fault):
        half = len(data) // 2
        if fault in ("drop", "truncate", "short", "stall"):
            self._write(data[:half])
            self.close_connection = True
        if fault == "stall":
            self.state.pause(60)
        elif fault == "drop":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "trickle":
            for place in range(len(data)):
                self._write(data[place : place + 1])
                self.state.pause(self.state.trickle_s)
        elif fault in ("truncate", "short"):
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
        else:
            self._write(data)
