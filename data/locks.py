"""Locks that keep two processes, also of two hosts, from writing one folder at once."""

import errno
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname

from filelock import FileLock, Timeout

from vzip.errors import UserError
from vzip.files import read_json_object, write_json
from vzip.redact import redacted

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP)
"""Errors of network file systems that are mounted without locks."""


def _holder_file(lock: Path) -> Path:
    """Return the file that says who holds a lock. The lock file itself must stay empty."""
    return lock.with_name(f"{lock.name}.json")


def holder(lock: Path) -> str:
    """Describe the process that holds a lock: its host, number, start and command."""
    # The process may have just begun, or just ended.
    try:
        who = read_json_object(_holder_file(lock), advice="")
    except UserError:
        return "another process"
    return f"process {who.get('pid')} on {who.get('host')} (since {who.get('since')}: {who.get('command')})"


@contextmanager
def locked(lock: Path, *, wait: bool, busy: str = "") -> Iterator[None]:
    """Hold a lock for the time of the `with` block. It ends with the process, however that ends.

    Args:
        lock: the lock's file, in a folder that exists. It stays there, empty.
        wait: wait for another process. Otherwise refuse at once.
        busy: how the message starts if another process holds the lock, such as "runs/a is being
            written". Needed unless `wait`.

    Raises:
        UserError: another process holds the lock, or the file system has no locks.
    """
    file_lock = FileLock(lock)
    try:
        file_lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise UserError(f"{busy} by {holder(lock)}; wait until it ends, or stop it") from error

        # Without this line, the command would seem to hang.
        print(f"waiting for {holder(lock)}, which holds {lock}", file=sys.stderr, flush=True)
        file_lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{lock.parent} is on a file system without locks ({error.strerror}), where two commands could "
            f"write at once; choose a folder on another disk"
        ) from error

    # Tell other processes whom they wait for.
    try:
        write_json(
            _holder_file(lock),
            {
                "host": gethostname(),
                "pid": os.getpid(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": shlex.join([redacted(word) for word in sys.argv]),
            },
        )
        yield
    finally:
        _holder_file(lock).unlink(missing_ok=True)
        file_lock.release()
