"""Only one process at a time writes a folder, and the next one is told who that is."""

import errno
import os
import sys
import time
from threading import Thread

import pytest

from data.locks import locked
from tests.helpers.commands import begin
from vzip import UserError


def test_the_second_process_is_told_who_holds_the_lock(tmp_path):
    lock = tmp_path / "run.lock"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from data.locks import locked\n"
        "with locked(Path(sys.argv[1]), wait=False):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with begin([sys.executable, "-c", code, str(lock)]) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"a is being written by process {other.pid} on .*wait until"):
            with locked(lock, wait=False, busy="a is being written"):
                pass
        other.kill()

    # A process that was killed holds nothing.
    with locked(lock, wait=False):
        assert lock.exists()


def test_who_waits_is_told_for_whom(tmp_path, capsys):
    lock = tmp_path / "data.lock"
    waiting = Thread(target=lambda: wait_for(lock))
    with locked(lock, wait=False):
        waiting.start()
        while "waiting for process" not in (printed := capsys.readouterr().err):
            time.sleep(0.01)
    waiting.join()
    assert f"waiting for process {os.getpid()} on" in printed and f"which holds {lock}" in printed


def wait_for(lock):
    with locked(lock, wait=True):
        pass


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fails)
    with pytest.raises(UserError, match=r"file system without locks .*choose a folder on another disk"):
        wait_for(tmp_path / "data.lock")
