"""Signals that ask a run to stop, in real runs: they save, and the same command goes on to the same bits."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from tests.helpers.commands import WarmScript, begin_ranks, environment, free_port, metrics, tune

pytestmark = pytest.mark.integration

STEPS = [
    "optim.max_steps=12",
    "optim.epochs=100",
    "save_every=50",
    "evaluate.questions=0",
    "data.num_workers=1",
]

SLOW = f"""
import runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch

# Slow steps, so that a signal reaches the run in the middle of them.
clip = torch.nn.utils.get_total_norm
def clip_slowly(*arguments, **settings):
    time.sleep(0.3)
    return clip(*arguments, **settings)

torch.nn.utils.get_total_norm = clip_slowly
runpy.run_path("train/tune.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(overrides, runs):
    return [*overrides, *STEPS, f"runs={runs}"]


@pytest.fixture(scope="module")
def whole(settings, runs):
    tune([*settings, "name=whole"])
    return runs / "whole"


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    script = tmp_path_factory.mktemp("slow") / "slow.py"
    script.write_text(SLOW)
    return script


def wait_for_steps(run, count=2, seconds=300):
    for _ in range(seconds * 20):
        if (run / "metrics.jsonl").is_file() and len(metrics(run)) >= count:
            return
        time.sleep(0.05)
    pytest.fail(f"{run} takes no steps")


def assert_goes_on(settings, run, whole):
    """The run has saved its last step, and ends as one that nobody stopped."""
    done = len(metrics(run))
    assert 2 <= done < 12
    assert [folder.name for folder in (run / "state").iterdir()] == [f"step{done}"]
    tune([*settings, f"name={run.name}"])
    assert (run / "projector.safetensors").read_bytes() == (whole / "projector.safetensors").read_bytes()
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_run_goes_on_to_the_same_bits(settings, runs, whole, slow, name, code):
    script = WarmScript([str(slow), *settings, f"name={name}"], environment())
    run = runs / name
    wait_for_steps(run)
    # Schedulers and terminals send the signal to the whole group, and so to the data workers.
    for process in [*psutil.Process(script.process.pid).children(), psutil.Process(script.process.pid)]:
        process.send_signal(getattr(signal, name))
    done = script.wait()
    assert done.returncode == code and "Traceback" not in done.stderr
    shown = name.replace("SIGINT", "Ctrl-C")
    assert f"error: stopped by {shown} after {len(metrics(run))} of 12 steps, which are saved" in done.stderr
    assert_goes_on(settings, run, whole)


def test_all_ranks_stop_after_the_same_step_if_one_is_asked(settings, runs, slow):
    ranks = begin_ranks([*settings, "name=ranks"], ranks=2, script=slow)
    run = runs / "ranks"
    wait_for_steps(run)
    os.kill(ranks[1].process.pid, signal.SIGUSR1)
    results = [rank.wait() for rank in ranks]
    assert [done.returncode for done in results] == [138, 138]
    assert "error: stopped by SIGUSR1" in results[0].stderr and "error:" not in results[1].stderr
    assert [folder.name for folder in (run / "state").iterdir()] == [f"step{len(metrics(run))}"]


def test_no_rank_outlives_its_launcher(settings, runs, slow):
    options = ["--num_gpus", "2", "--master_port", str(free_port())]
    launcher = subprocess.Popen(
        ["deepspeed", *options, str(slow), *settings, "name=orphans"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_steps(runs / "orphans")
    others = psutil.Process(launcher.pid).children(recursive=True)
    assert len(others) >= 3  # DeepSpeed's launch process and two ranks
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(others, timeout=60)
    for process in alive:
        process.kill()
    assert alive == []
    num_done = len(metrics(runs / "orphans"))
    assert [folder.name for folder in (runs / "orphans" / "state").iterdir()] == [f"step{num_done}"]


def test_ctrl_c_under_make_ends_with_a_message(settings, runs, slow):
    """`make tune` starts the ranks with this command."""
    options = ["--log_level", "critical", "--num_gpus", "2", "--master_port", str(free_port())]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "train.guards.launch", *options, str(slow), *settings, "name=launched"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_steps(runs / "launched")
    launcher.send_signal(signal.SIGINT)
    _, error = launcher.communicate()
    assert launcher.returncode == 130
    assert error.count("error: stopped by Ctrl-C after") == 1 and "Traceback" not in error


def test_torchrun_trains_on_two_ranks(settings, runs):
    launcher = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [*launcher, "train/tune.py", *settings, "name=torchrun", "optim.max_steps=2"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"world_size": 2' in (runs / "torchrun" / "env.json").read_text()


def test_folders_with_spaces_work(settings, runs, tmp_path):
    tune([*settings, f"runs='{tmp_path}/my runs'", "name=spaced", "optim.max_steps=1"])
    assert (tmp_path / "my runs" / "spaced" / "result.json").is_file()
