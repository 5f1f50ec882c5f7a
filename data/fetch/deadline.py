"""Deadlines of HTTP requests, which hold for every byte that a server sends.

The timeout of a socket starts again with each byte. A server that sends a byte now and then would
keep a request waiting for ever, also in the header of its answer. The connections here look at a
deadline before each read.
"""

import io
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection


class Deadline:
    """A time by which a request must be done, or must have made progress.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.renew()

    def renew(self) -> None:
        """Start again from now: there was progress."""
        self._end = time.monotonic() + self.seconds

    def left_s(self) -> float:
        """Return the seconds that are left. Negative after the deadline."""
        return self._end - time.monotonic()


class _OfThread(threading.local):
    """The deadline of the request that a thread makes."""

    # The HTTP library hands nothing down to a connection but a timeout, so the deadline goes this way.
    deadline = Deadline(math.inf)


_of_thread = _OfThread()


@contextmanager
def applied(deadline: Deadline) -> Iterator[None]:
    """Apply a deadline to all that this thread reads in the `with` block."""
    before = _of_thread.deadline
    _of_thread.deadline = deadline
    try:
        yield
    finally:
        _of_thread.deadline = before


class _TimedReader(io.RawIOBase):
    """Reads a socket, with its own timeout and the deadline of the thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._timeout = sock.gettimeout()
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = _of_thread.deadline.left_s()
        if left <= 0:
            raise TimeoutError("the deadline has passed")

        # Without a timeout of its own, the socket waits as long as the deadline allows.
        timeout = min(left, math.inf if self._timeout is None else self._timeout)
        self._socket.settimeout(None if timeout == math.inf else timeout)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(HTTPResponse):
    """An answer whose header and body are read with `_TimedReader`."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        # Nothing was read through the library's own file yet.
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(sock))


class _TimedConnection(HTTPConnection):
    response_class = _TimedResponse


class _TimedSecureConnection(HTTPSConnection):
    response_class = _TimedResponse


class _TimedPool(HTTPConnectionPool):
    ConnectionCls = _TimedConnection


class _TimedSecurePool(HTTPSConnectionPool):
    ConnectionCls = _TimedSecureConnection


def with_deadlines(manager: PoolManager) -> PoolManager:
    """Make a manager use connections that know deadlines, and return it."""
    manager.pool_classes_by_scheme = {"http": _TimedPool, "https": _TimedSecurePool}
    return manager
