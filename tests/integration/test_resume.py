"""Runs that are killed, also while they save, go on to the same bits; and two never write one folder."""

import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import vzip
from tests.conftest import ROOT
from tests.helpers.commands import (
    WarmScript,
    assert_same_metrics,
    begin_ranks,
    command,
    environment,
    metrics,
    start,
    start_ranks,
    tune,
)

pytestmark = pytest.mark.integration

WAIT_S = 300
"""Seconds after which a test gives up to wait for a process."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(overrides, runs):
    """Runs of 10 steps, with states after 4 and 8 steps."""
    steps = ["optim.max_steps=10", "optim.epochs=4", "save_every=4", "evaluate.questions=0"]
    return [*overrides, *steps, f"runs={runs}"]


def assert_same_bits(run, whole):
    assert metrics(run) == metrics(whole)
    projectors = [folder / "projector.safetensors" for folder in (run, whole)]
    assert projectors[0].read_bytes() == projectors[1].read_bytes()
    assert not (run / "state").exists()


def wait_until(condition):
    """Wait for something that another process does."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


KILLED_WHILE_IT_SAVES = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})

from train.state import StateFolder

# Count the calls of fsync while the state after 8 steps is saved.
left = int(os.environ["KILLED_AT"])
is_saving = False
begin, fsync = StateFolder.begin, os.fsync

def begin_and_count(states, step):
    global is_saving
    is_saving = step == 8
    begin(states, step)

def fsync_and_die(descriptor):
    global left
    fsync(descriptor)
    left -= is_saving
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

StateFolder.begin = begin_and_count
os.fsync = fsync_and_die
runpy.run_path("train/tune.py", run_name="__main__")
"""


def test_a_run_killed_while_it_saves_resumes_to_the_same_bits(settings, runs, tmp_path):
    # With several budgets, which are drawn anew for each micro batch.
    elastic = [*settings, "reducer.budget=[4,7]", "batch.tokens=300"]
    tune([*elastic, "name=whole"])

    # While it writes the second part of the next state, then its index, then just after that.
    run = runs / "killed"
    program = tmp_path / "killed.py"
    program.write_text(KILLED_WHILE_IT_SAVES)
    first = run / "state" / "step4" / "state.json"
    second = run / "state" / "step8" / "state.json"
    for killed_at, is_saved in ((4, False), (10, False), (11, True)):
        done = start([sys.executable, str(program), *elastic, "name=killed"], KILLED_AT=str(killed_at))
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert first.is_file() and second.parent.is_dir() and second.is_file() == is_saved
        assert len(metrics(run)) == 8
    with pytest.raises(vzip.UserError, match="has not finished"):
        vzip.load(run)

    # A damaged state is passed over, and said so.
    weights = second.with_name("weights.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = tune([*elastic, "name=killed"])
    assert f"{weights} is damaged" in done.stdout and f"resuming from {first.parent}" in done.stdout
    assert_same_bits(run, runs / "whole")


STOPPED_WHILE_IT_SAVES = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from train.engine import Engine

gather = Engine.gather
def gather_or_stop(engine, part):
    if part == "exp_avg" and engine.rank == 1 and os.path.exists(os.environ["STATE"]):
        os.kill(os.getpid(), signal.SIGSTOP)
    return gather(engine, part)

Engine.gather = gather_or_stop
runpy.run_path("train/tune.py", run_name="__main__")
"""


def is_stopped(process):
    """Whether a process was stopped, but not ended."""
    stat = Path(f"/proc/{process.pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_state_that_a_rank_did_not_finish_is_no_state(settings, runs, tmp_path, zero):
    two_ranks = [*settings, f"deepspeed={zero}", "engine=reference", "batch.micro=2"]
    tune([*two_ranks, f"name=whole-{zero}"], ranks=2)

    # Rank 1 stops in the middle of the second state, then the machine goes down.
    run = runs / zero
    program = tmp_path / "stopped.py"
    program.write_text(STOPPED_WHILE_IT_SAVES)
    first = run / "state" / "step4" / "state.json"
    scripts = begin_ranks([*two_ranks, f"name={zero}"], ranks=2, script=program, STATE=str(first))
    wait_until(lambda: is_stopped(scripts[1].process) or not scripts[0].process.is_alive())
    wait_until(lambda: (run / "state" / "step8" / "weights.safetensors").is_file())
    for script in scripts:
        script.process.kill()
    for script in scripts:
        script.wait()
    assert first.is_file() and not (run / "state" / "step8" / "state.json").exists()

    done = tune([*two_ranks, f"name={zero}"], ranks=2)
    assert "step8 was not finished" in done.stdout and f"resuming from {first.parent}" in done.stdout
    assert_same_bits(run, runs / f"whole-{zero}")


def test_a_run_goes_on_with_another_number_of_ranks(settings, runs, tmp_path):
    on_any_ranks = [*settings, "deepspeed=zero2", "engine=reference", "batch.micro=2"]
    tune([*on_any_ranks, "name=one-rank"])

    fewer = [*on_any_ranks, "name=fewer"]
    program = tmp_path / "killed.py"
    program.write_text(KILLED_WHILE_IT_SAVES)
    scripts = begin_ranks(fewer, ranks=2, script=program, KILLED_AT="1")
    scripts[0].process.join()
    scripts[1].process.kill()
    for script in scripts:
        script.wait()

    # Without a whole state, both ranks end with one message.
    shutil.copytree(runs / "fewer", runs / "damaged")
    weights = runs / "damaged" / "state" / "step4" / "weights.safetensors"
    weights.write_bytes(b"")
    done = start_ranks([*fewer, "name=damaged"], ranks=2)
    assert done.returncode == 2 and f"{weights} is damaged" in done.stderr
    assert "Traceback" not in done.stderr

    tune(fewer)
    assert_same_metrics(runs / "fewer", runs / "one-rank")


def test_a_second_command_is_refused_while_a_run_lives(settings, runs):
    long = [*settings, "name=alive", "optim.max_steps=30000", "optim.epochs=10000"]
    script = WarmScript(command(long)[1:], environment())
    wait_until(lambda: (runs / "alive" / "metrics.jsonl").is_file() or not script.process.is_alive())
    done = start(command([*long, "fresh=true"]))
    assert done.returncode == 2, done.stderr
    assert f"{runs / 'alive'} is being written by process {script.process.pid} on" in done.stderr
    assert "Traceback" not in done.stderr
    assert script.process.is_alive()
    script.process.kill()
    script.wait()

    # The lock ends with the process, however that ended.
    short = ["optim.max_steps=2", "optim.epochs=4", "fresh=true"]
    tune([*long, *short])
