"""A real web server on loopback that serves a folder, and misbehaves as told: for tests of what downloads."""

import hashlib
import re
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.fetch.http import Client

# Faults that a plan may name:
#   drop        the connection is reset in the middle of the body
#   truncate    it is closed there, and the length was said
#   short       as well, but no length was said
#   stall       nothing more comes
#   trickle     a byte now and then
#   header      as well, but in the header of the answer, which never ends
#   endless     bytes without an end, and no length was said
#   to URL      a redirect to an address
#   html        a page that says sorry, with status 200
#   whole       the whole file, whatever part was asked for
#   shifted     another part than was asked for
#   302         a redirect to the same file, at /moved/...
#   loop        a redirect to itself
#   404, 429, 503
MOVED = "/moved"
HUB = re.compile(r"/(?:datasets/)?[^/]+/[^/]+/resolve/main")
"""How paths of the Hugging Face hub begin: the files behind it are served from the folder too."""
PAGE = b"<html><body>Sorry, this picture is not available.</body></html>"


def client(**settings):
    """Make a client that waits little between attempts, but long for an answer.

    A busy machine is no fault of the server.
    A test of a server that stalls gives a shorter `read_s`.
    """
    return Client(**{"attempts": 3, "first_wait_s": 0.01, **settings})


def seeded(faults, share, *, seed=0):
    """A plan in which a share of all paths have one of some faults, once; the same for a seed."""

    def plan(path):
        draw = hashlib.sha256(f"{seed}:{path}".encode()).digest()
        is_hit = int.from_bytes(draw[:4], "big") < share * 2**32
        if is_hit and not path.startswith(MOVED):
            return [faults[draw[4] % len(faults)]]
        return []

    return plan


class Server:
    """A web server of a folder's files, with ranges, that also answers as the hub does.

    Use it as `with Server(folder, plan) as server:`; its address is `server.url`.

    Args:
        folder: what is served.
        plan: the faults of a path ("/a/b.jpg"), as a dict or a function such as `seeded` makes. A list of
            faults is used up, request by request. A text holds for ever.
        delay_s: wait before each answer.
        retry_after: header of answers with status 429 and 503.
        trickle_s: wait between two bytes of "trickle".
    """

    def __init__(self, folder, plan=None, *, delay_s=0.0, retry_after="0", trickle_s=0.05):
        self.folder = Path(folder)
        self.plan = plan if callable(plan) else (plan or {}).get
        self.delay_s = delay_s
        self.retry_after = retry_after
        self.trickle_s = trickle_s

        self.requests = Counter()  # GET requests by path
        self.sent = Counter()  # bytes by path
        self.ranges = []  # (first, last) byte of each file that was sent
        self.logins = {}  # the last login that a path was asked with
        self.max_concurrent = 0
        self.num_connections = 0
        self.lock = threading.Lock()
        self._faults = {}
        self._num_concurrent = 0
        self._is_closing = threading.Event()

    def __enter__(self):
        self._http = _Http(("127.0.0.1", 0), partial(_Handler, server_state=self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=partial(self._http.serve_forever, poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._is_closing.set()  # wakes up those that stall
        self._http.shutdown()
        self._http.server_close()

    def pause(self, seconds):
        """Wait. Returns whether the server closes."""
        return self._is_closing.wait(seconds)

    def begin(self, path):
        """Count a request. Returns its fault, or None."""
        with self.lock:
            self._num_concurrent += 1
            self.max_concurrent = max(self.max_concurrent, self._num_concurrent)
            self.requests[path] += 1

            faults = self._faults.setdefault(path, self.plan(path) or [])
            if isinstance(faults, str):
                return faults
            if not faults:
                return None
            self._faults[path] = faults[1:]
            return faults[0]

    def end(self, path, num_bytes):
        with self.lock:
            self._num_concurrent -= 1
            self.sent[path] += num_bytes


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    num_sent = 0

    def __init__(self, *arguments, server_state):
        self.state = server_state
        super().__init__(*arguments)

    def setup(self):
        super().setup()
        with self.state.lock:
            self.state.num_connections += 1

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.num_sent = 0
        self.state.logins[path] = self.headers.get("Authorization")
        fault = self.state.begin(path)
        try:
            self.state.pause(self.state.delay_s)
            self._answer(path, fault)
        finally:
            self.state.end(path, self.num_sent)

    def _file(self, path):
        path = HUB.sub("", path.removeprefix(MOVED), count=1)
        return self.state.folder / path.lstrip("/")

    def _send_head(self, status, length, **headers):
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
        self._send_head(status, len(data), **headers)
        self._write(data)

    def _answer(self, path, fault):
        file = self._file(path)
        if fault in ("429", "503"):
            self._say(int(fault), b"no", Retry_After=self.state.retry_after)
        elif fault == "html":
            self._say(200, PAGE, Content_Type="text/html")
        elif fault == "302":
            self._say(302, Location=f"{self.state.url}{MOVED}{self.path}")
        elif fault == "loop":
            self._say(302, Location=self.path)
        elif fault and fault.startswith("to "):
            self._say(302, Location=fault.removeprefix("to "))
        elif fault == "header":
            self._send_endlessly(b"HTTP/1.1 200 OK\r\nX: ", b"x", self.state.trickle_s)
        elif fault == "endless":
            self._send_head(200, None)
            self._send_endlessly(b"[", b"0," * 2**15, 0)
        elif fault == "404" or not file.is_file():
            self._say(404, b"not found")
        else:
            self._send_file(file, fault)

    def _send_endlessly(self, start, part, wait_s):
        """Send the start, and then the part again and again, until the client or the server goes away."""
        self.close_connection = True
        with suppress(OSError):
            self._write(start)
            while not self.state.pause(wait_s):
                self._write(part)

    def _send_file(self, file, fault):
        size = file.stat().st_size
        etag = f'"{file.stat().st_mtime_ns}-{size}"'
        first, last, status, headers = 0, size - 1, 200, {"ETag": etag}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        is_same = self.headers.get("If-Range", etag) == etag
        if asked and is_same and fault != "whole":
            first = int(asked[1]) + (fault == "shifted")
            last = min(int(asked[2] or size), size - 1)
            status = 206
            headers["Content_Range"] = f"bytes {first}-{last}/{size}"

        self.state.ranges.append((first, last))
        with file.open("rb") as opened:
            opened.seek(first)
            data = opened.read(last - first + 1)
        self._send_head(status, None if fault == "short" else len(data), **headers)
        self._send_body(data, fault)

    def _send_body(self, data, fault):
        if fault == "trickle":
            for position in range(len(data)):
                self._write(data[position : position + 1])
                self.state.pause(self.state.trickle_s)
        elif fault in ("drop", "truncate", "short", "stall"):
            self._write(data[: len(data) // 2])
            self._break_off(fault)
        else:
            self._write(data)

    def _break_off(self, fault):
        self.close_connection = True
        if fault == "stall":
            self.state.pause(60)
        elif fault == "drop":
            # Closed with this option, the connection is reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
