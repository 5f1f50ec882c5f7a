"""Runs that are killed, asked to stop, or disturbed by a second command."""

import os
import random
import re
import signal
import time
from pathlib import Path

from tests.conftest import ROOT
from tests.faults.world import NUM_STEPS, World, check_end, check_same_bits
from tests.helpers.commands import metrics

KINDS = [(1, "zero0"), (2, "zero0"), (2, "zero2"), (2, "zero3"), (1, "zero2")]
"""Ranks, and how they share what they hold."""

KILLED_AT_A_WRITE = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train.loop

# Count the calls of fsync from the first step on, and kill the process after the given one.
left = int(os.environ.pop("VZIP_KILLED_AT"))
is_training = False
fsync, step = os.fsync, train.loop.train_step

def fsync_or_die(descriptor):
    global left
    fsync(descriptor)
    left -= is_training
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def step_and_count(*arguments):
    global is_training
    is_training = True
    return step(*arguments)

os.fsync, train.loop.train_step = fsync_or_die, step_and_count
runpy.run_path("train/tune.py", run_name="__main__")
"""


def kill(world: World, rng: random.Random, number: int) -> None:
    """Kill a run at a random moment, every second time while it writes a file."""
    ranks, zero = KINDS[number % len(KINDS)]
    more = [f"deepspeed={zero}"]
    reference = world.reference(*more, ranks=ranks)
    settings = world.settings(f"kill-{number}", *more)
    run = world.runs / f"kill-{number}"

    if number % 2:
        write = rng.randint(1, 12 * NUM_STEPS)
        world.description = f"{ranks} rank(s), {zero}, killed at write {write}"
        script = world.folder / "killed.py"
        script.write_text(KILLED_AT_A_WRITE)
        os.environ["VZIP_KILLED_AT"] = str(write)
        scripts = world.begin_tune(settings, ranks=ranks, script=script)
        del os.environ["VZIP_KILLED_AT"]
        # The first rank that ends takes the others with it, as on a machine that loses power.
        while all(each.process.is_alive() for each in scripts):
            time.sleep(0.01)
    else:
        step = rng.randint(1, NUM_STEPS - 1)
        delay = rng.random() * 0.3
        world.description = f"{ranks} rank(s), {zero}, killed {delay:.3f} s after step {step}"
        scripts = world.begin_tune(settings, ranks=ranks)
        world.wait_for_steps(run, step, scripts)
        time.sleep(delay)

        # The memory of a machine may run out, which ends one rank alone.
        if ranks > 1 and number // len(KINDS) % 2:
            one = rng.randrange(ranks)
            world.description += f", rank {one} alone"
            scripts[one].process.kill()
            for rank, each in enumerate(scripts):
                if rank != one:
                    check_end(world.end(each), 0, 2)
    for each in scripts:
        each.process.kill()
    for each in scripts:
        each.process.join()

    check_end(world.tune(settings, ranks=ranks), 0)
    check_same_bits(run, reference)


def signals(world: World, rng: random.Random, number: int) -> None:
    """Ask a run to stop, in its steps or before them."""
    kind = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)[number % 4]
    ranks = 1 + number // 4 % 2
    step = rng.choice([0, rng.randint(1, NUM_STEPS)])
    world.description = f"{ranks} rank(s), {kind.name} after step {step}"
    reference = world.reference(ranks=ranks)
    settings = world.settings(f"signal-{number}")
    run = world.runs / f"signal-{number}"

    if step:
        # One rank is enough.
        kill_it = f"os.kill(os.getpid(), {int(kind)})"
        script = world.hooked(step, kill_it, ranks=(rng.randrange(ranks),))
        scripts = world.begin_tune(settings, ranks=ranks, script=script)
    else:
        # Wait until the process listens: before that, a signal ends it without a message. It is
        # still loading after the pause below.
        scripts = world.begin_tune(settings, ranks=ranks)
        for each in scripts:
            while not _listens(each.process.pid):
                time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        for each in scripts:
            os.kill(each.process.pid, kind)

    done, *_ = [world.end(each) for each in scripts]
    check_end(done, 128 + kind)
    if step:
        assert f"after {step} of {NUM_STEPS} steps, which are saved" in done.stderr, "not saved"
        states = [folder.name for folder in (run / "state").iterdir()]
        assert f"step{step}" in states, f"no state after the last step: {states}"
        assert len(metrics(run)) == step, "it went on"
    check_end(world.tune(settings, ranks=ranks), 0)
    check_same_bits(run, reference)


def _listens(pid: int) -> bool:
    """Tell whether a process has a handler for SIGUSR1, which nobody but a run has."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def together(world: World, rng: random.Random, number: int) -> None:
    """Start a command a second time while the first one runs."""
    more = [[], ["fresh=true"]][number % 2]
    step = rng.randint(1, 4)
    world.description = f"second command {' '.join(more)} after step {step}"
    reference = world.reference()
    settings = world.settings(f"together-{number}")
    # The second one needs seconds to start, so the first one stops before its next step.
    stop = world.hooked(step + 1, "os.kill(os.getpid(), signal.SIGSTOP)")
    (first,) = world.begin_tune(settings, script=stop)
    world.wait_for_steps(world.runs / f"together-{number}", step, [first])
    time.sleep(0.2)
    second = world.tune([*settings, *more])
    os.kill(first.process.pid, signal.SIGCONT)
    check_end(second, 2)
    assert str(first.process.pid) in second.stderr, f"the holder is not named: {second.stderr[-300:]}"
    check_end(world.end(first), 0)
    check_same_bits(world.runs / f"together-{number}", reference)
