"""Signals that ask a process to stop, in real processes of the standard library alone."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

LOOP = """
import os, sys, time
from train.guards.launcher import launcher_watch
from train.guards.signals import STOP, Stopped

STOP.listen(launcher_watch())
{before}
with STOP.noted():
    print("ready", flush=True)
    for step in range(400):
        time.sleep(0.05)
        STOP.agree(STOP.flags())
        if STOP.agreed:
            stopped = Stopped(STOP.agreed, step, 400)
            print(stopped, file=sys.stderr)
            sys.exit(stopped.exit_code)
"""
"""A loop that saves nothing, but asks for signals as the training loop does."""

NEVER_ASKS = LOOP.replace("STOP.agree(STOP.flags())", "pass")
"""A loop that waits for another rank for ever."""

WAIT = "print('ready', flush=True); time.sleep(20)"
"""What a run does before its loop."""


def begin(program, *words, before="", **variables):
    """Start a program, and wait until it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", program.format(before=before), *words],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def end(process):
    """(exit code, stderr) of a process that must end soon."""
    _, error = process.communicate(timeout=15)
    return process.returncode, error


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGHUP", 129), ("SIGINT", 130)]
)
def test_the_loop_learns_of_a_signal_and_outside_of_it_the_process_ends(name, code):
    shown = name.replace("SIGINT", "Ctrl-C")
    process = begin(LOOP)
    process.send_signal(getattr(signal, name))
    assert (process.wait(timeout=15), code) == (code, code)
    error = process.stderr.read()
    assert f"stopped by {shown} after" in error and "which are saved" in error

    process = begin(LOOP, before=WAIT)
    process.send_signal(getattr(signal, name))
    assert end(process) == (
        code,
        f"\nerror: stopped by {shown} without saving; the same command goes on from what is saved\n",
    )


def test_a_second_ctrl_c_ends_a_process_that_waits_for_others():
    process = begin(NEVER_ASKS)
    process.send_signal(signal.SIGINT)
    assert "a second Ctrl-C ends at once" in process.stderr.readline() + process.stderr.readline()

    # What a launcher hands on right after Ctrl-C is no second one, and neither is its SIGTERM.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, error = end(process)
    assert code == 130 and "stopped by Ctrl-C without saving" in error


def test_an_ignored_signal_stays_ignored():
    """As `nohup` asks for."""
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + LOOP
    process = begin(program)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143


def test_a_forked_childs_signals_are_its_own():
    child = """
import signal
child = os.fork()
if child == 0:
    time.sleep(20)
    os._exit(0)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
assert os.WTERMSIG(status) == signal.SIGTERM, status
time.sleep(0.2)
"""
    process = begin(LOOP, before=child)
    process.send_signal(signal.SIGUSR1)
    assert end(process)[0] == 138


LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", {program!r}], stderr=subprocess.DEVNULL)
print(rank.pid, flush=True)
rank.wait()
"""
"""Starts a rank. With the name of DeepSpeed's launcher among its words, it looks like that."""


def has_ended(pid, seconds):
    for _ in range(int(seconds * 20)):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("variables", "is_ended"), [({"CROSS_RANK": "0"}, True), ({}, False)])
def test_a_rank_ends_with_its_launcher_but_not_with_its_shell(variables, is_ended):
    rank = LOOP.format(before="")
    # As make does, a shell stands around the launcher.
    launcher = [sys.executable, "-c", LAUNCHER.format(program=rank), "deepspeed.launcher.launch"]
    process = subprocess.Popen(
        launcher, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True
    )
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == "ready\n"
    try:
        process.kill()
        process.wait()
        assert has_ended(pid, 10 if is_ended else 1.5) == is_ended
    finally:
        if not is_ended:
            os.kill(pid, signal.SIGKILL)
