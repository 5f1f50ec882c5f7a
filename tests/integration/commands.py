"""Start the recipe as its users do."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

BIN = Path(sys.executable).parent


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


def start(arguments, **changes):
    """Run a command at the repository's root to its end, whatever its exit code."""
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
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
