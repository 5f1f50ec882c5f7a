"""A file is written whole or not at all, whoever else writes it and whenever a process ends."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from data.paths import ROOT
from vzip import UserError
from vzip.files import atomic_write, delete_leftovers, machine_name, read_json_object, write_json


def write_often(path):
    for number in range(100):
        write_json(path, list(range(number)))


def test_two_processes_may_write_the_same_file(tmp_path):
    path = tmp_path / "a.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_often, args=(path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0]
    assert json.loads(path.read_text()) == list(range(99))
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as scratch:
        scratch.write_text("2")
        raise KeyboardInterrupt

    assert path.read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_nothing_for_long_and_a_live_one_is_left_alone(tmp_path):
    path = tmp_path / "a[1].json"
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from vzip.files import atomic_write\n"
        "assert 'torch' not in sys.modules, 'commands that need no torch would wait for it'\n"
        "with atomic_write(Path(sys.argv[1])) as scratch:\n"
        "    scratch.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    (leftover,) = tmp_path.iterdir()

    machine = machine_name()
    running = tmp_path / f"{path.name}.{machine}-{os.getppid()}-0a.vzip-tmp"
    of_another_file = tmp_path / leftover.name.replace(path.name, f"{path.name}.gz")
    of_another_host = tmp_path / leftover.name.replace(machine, "elsewhere-1")
    foreign = tmp_path / "mine.123.tmp"
    for other in (running, of_another_file, of_another_host, foreign):
        other.write_text("not a leftover of this file")

    write_json(path, 3)
    assert path.read_text() == "3"
    assert set(tmp_path.iterdir()) == {path, running, of_another_file, of_another_host, foreign}

    delete_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {path, running, of_another_host, foreign}

    # After a week, nobody on the other host writes it any more.
    os.utime(of_another_host, (0, 0))
    delete_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {path, running, foreign}


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff", b"[" * 100_000, b"[]"])
def test_a_damaged_json_file_is_named_with_advice(tmp_path, content):
    path = tmp_path / "meta.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.json is damaged.*; copy it again"):
        read_json_object(path, advice="copy it again")


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("a" * 250 + ".json")
    write_json(path, 1)
    assert list(tmp_path.iterdir()) == [path]
