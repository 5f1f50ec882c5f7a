"""Start the recipe as its users do."""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT

BIN = Path(sys.executable).parent
IMPORTED = multiprocessing.get_context("forkserver")
"""Makes processes in which the recipe's packages are imported already: importing them takes longer than most of the tests."""
IMPORTED.set_forkserver_preload(["train.tune"])


def command(overrides, *, ranks=None):
    """`python train/tune.py ...`, or `deepspeed train/tune.py ...` on that many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(port)]
    starter = [sys.executable] if ranks is None else launcher
    return [*starter, "train/tune.py", *overrides]


def environment(**changes):
    """This process's, without a wandb account, a launcher or a make around it."""
    others = ("WANDB", "MASTER", "RANK", "WORLD", "LOCAL", "SLURM", "MAKE")
    hidden = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    return {**hidden, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "160", **changes}


def _run_script(arguments, variables, printed):
    """In the new process: what `python SCRIPT ...`, or `python -m MODULE ...`, would do."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    for descriptor, path in zip((0, 1, 2), (os.devnull, *printed), strict=True):
        os.dup2(os.open(path, os.O_RDWR), descriptor)
    if arguments[0] == "-m":
        sys.path.insert(0, str(ROOT))
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _start_script(arguments, variables):
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = IMPORTED.Process(target=_run_script, args=(arguments, variables, (out.name, err.name)))
        process.start()
        process.join()
        texts = [Path(file.name).read_text() for file in (out, err)]
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def start(arguments, **changes):
    """Run a command at the repository's root to its end, whatever its exit code; a script in a process that is warm."""
    variables = environment(**changes)
    if arguments[0] == sys.executable and (arguments[1] == "-m" or arguments[1].endswith(".py")):
        return _start_script(arguments[1:], variables)
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def tune(overrides, *, ranks=None, **changes):
    """Run the recipe; it must succeed."""
    done = start(command(overrides, ranks=ranks), **changes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def metrics(run):
    """The values of metrics.jsonl that must not depend on the machine: (step, loss, gradient norm)."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in map(json.loads, lines)]


def assert_same_metrics(run, reference):
    """Losses and gradient norms, to rounding."""
    print(run.name, metrics(run))  # shown by `pytest -s`
    for got, expected in zip(metrics(run), metrics(reference), strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def assert_same_run(run, reference):
    """Also the projectors: each tensor as a whole, as AdamW makes steps of gradients that are nothing but rounding."""
    assert_same_metrics(run, reference)
    ours, theirs = load_file(run / "projector.safetensors"), load_file(reference / "projector.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() < 1e-4 * value.norm(), name
