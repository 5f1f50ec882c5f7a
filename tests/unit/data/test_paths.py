"""Files are written whole, whoever else writes them and whenever a process ends."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from data.paths import atomic_write, write_json
from tests.conftest import ROOT


def write_often(path):
    for number in range(100):
        write_json(path, list(range(number)))


def test_two_processes_may_write_the_same_file(tmp_path):
    path = tmp_path / "a.json"
    processes = [
        multiprocessing.get_context("fork").Process(target=write_often, args=(path,)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert json.loads(path.read_text()) == list(range(99)) and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as scratch:
        scratch.write_text("2")
        raise KeyboardInterrupt
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_deleted_and_what_a_live_one_writes_is_not(tmp_path):
    path = tmp_path / "a[1].json"
    code = (
        "import os, sys; from pathlib import Path; from data.paths import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as scratch: scratch.write_text('half'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -9 and len(list(tmp_path.iterdir())) == 1
    alive = tmp_path / f"a[1].json.{os.getppid()}-1.vzip-tmp"
    alive.write_text("not mine")
    write_json(path, 3)
    assert set(tmp_path.iterdir()) == {path, alive} and path.read_text() == "3"
