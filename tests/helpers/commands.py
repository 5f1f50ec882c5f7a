"""Start the recipe as its users do, in processes that have imported it already."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT

BIN = Path(sys.executable).parent

WARM = multiprocessing.get_context("forkserver")
"""Makes processes that have imported the recipe's packages: the imports take longer than most tests."""
WARM.set_forkserver_preload(["train.tune"])


def command(overrides):
    """The words of `python train/tune.py ...`."""
    return [sys.executable, "train/tune.py", *overrides]


def environment(**changes):
    """The environment of this process, without a wandb account, a launcher or a make around it."""
    others = ("WANDB", "MASTER", "RANK", "WORLD", "LOCAL", "SLURM", "MAKE")
    hidden = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    return {**hidden, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "160", **changes}


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run_script(arguments, variables, out, err):
    """Do in this new process what `python SCRIPT ...` or `python -m MODULE ...` would do."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    for descriptor, path in zip((0, 1, 2), (os.devnull, out, err), strict=True):
        os.dup2(os.open(path, os.O_RDWR), descriptor)

    if arguments[0] == "-m":
        sys.path.insert(0, str(ROOT))
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


class WarmScript:
    """A script that runs in a warm process, and what it prints."""

    def __init__(self, arguments, variables):
        self.arguments = arguments
        self.folder = tempfile.TemporaryDirectory()
        self.out = Path(self.folder.name, "out")
        self.err = Path(self.folder.name, "err")
        self.out.touch()
        self.err.touch()

        target = (arguments, variables, self.out, self.err)
        self.process = WARM.Process(target=_run_script, args=target)
        self.process.start()

    def wait(self):
        """Wait for the end of the script, as `subprocess.run` does."""
        self.process.join()
        out, err = self.out.read_text(), self.err.read_text()
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, out, err)


def start(arguments, **changes):
    """Run a command at the repository's root to its end, whatever its exit code."""
    variables = environment(**changes)

    is_script = arguments[0] == sys.executable and (arguments[1] == "-m" or arguments[1].endswith(".py"))
    if is_script:
        return WarmScript(arguments[1:], variables).wait()

    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def begin(command, **changes):
    """Begin a command at the repository's root. Its process prints into a pipe."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def begin_ranks(overrides, *, ranks, script="train/tune.py", **changes):
    """Begin the recipe on several ranks of this machine, as the DeepSpeed launcher starts them."""
    port = free_port()
    scripts = []
    for rank in range(ranks):
        launched = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        arguments = [str(script), f"--local_rank={rank}", *overrides]
        scripts.append(WarmScript(arguments, environment(**launched, **changes)))
    return scripts


def start_ranks(overrides, *, ranks, **changes):
    """Run the recipe on several ranks to its end, whatever its exit code."""
    scripts = begin_ranks(overrides, ranks=ranks, **changes)

    # As the launcher does: when one rank fails, the others would wait for it for ever.
    while any(script.process.is_alive() for script in scripts):
        time.sleep(0.1)
        if any(script.process.exitcode for script in scripts):
            for script in scripts:
                script.process.terminate()

    # Of those that failed, the rank that did so by itself counts, and not one that SIGTERM ended.
    results = [script.wait() for script in scripts]
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    return max(results, key=lambda result: -1 if result.returncode in ended else result.returncode)


def tune(overrides, *, ranks=None, **changes):
    """Run the recipe, which must succeed."""
    if ranks is None:
        done = start(command(overrides), **changes)
    else:
        done = start_ranks(overrides, ranks=ranks, **changes)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def metrics(run):
    """The values of metrics.jsonl that do not depend on the machine: (step, loss, gradient norm)."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines]


def assert_same_metrics(run, reference):
    """Losses and gradient norms agree, but for rounding."""
    print(run.name, metrics(run))  # shown by `pytest -s`
    for got, expected in zip(metrics(run), metrics(reference), strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def assert_same_run(run, reference):
    """The projectors agree too, tensor by tensor: AdamW also steps along gradients that are only rounding."""
    assert_same_metrics(run, reference)

    ours = load_file(run / "projector.safetensors")
    theirs = load_file(reference / "projector.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() < 1e-4 * value.norm(), name
