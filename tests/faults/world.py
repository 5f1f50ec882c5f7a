"""What all campaigns share: a tiny model, its data, commands in warm processes, and their ends."""

import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.commands import WarmScript, begin_ranks, environment, metrics

WAIT_S = 240
"""Seconds after which a command counts as hanging."""

NUM_STEPS = 8

HOOKED = """
import os, resource, runpy, signal, sys
sys.path.insert(0, {root!r})
import train.loop

num_calls = 0
train_step = train.loop.train_step

def hooked_step(*arguments):
    global num_calls
    num_calls += 1
    if num_calls == {step} and int(os.environ["RANK"]) in {ranks}:
        {code}
    return train_step(*arguments)

train.loop.train_step = hooked_step
runpy.run_path("train/tune.py", run_name="__main__")
"""
"""The recipe, with a line of code that is run before a step."""

LOAD = """
import sys
import vzip
from train.cli import exit_on_user_error

@exit_on_user_error
def main():
    vzip.load(sys.argv[1])

main()
"""
"""The library's own way to open a run, as a command."""


class World:
    """A folder with a tiny model and its data, in which runs are tuned.

    Attributes:
        folder: the folder.
        description: what the trial that runs does to the project.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.description = ""
        self._scripts: list[WarmScript] = []
        self._references: dict[tuple[str, ...], Path] = {}

        tiny.save_llava(folder / "model")
        tiny.save_data(folder / "data")
        tiny.save_data(folder / "data", 8, text_only=0, held_out=True, seed=1)
        self.load_script = folder / "load.py"
        self.load_script.write_text(LOAD)

    def settings(self, name: str, *more: str, base: Path | None = None) -> list[str]:
        """Return the settings of a run of 8 steps that saves after each."""
        data = self.folder / "data"
        return [
            *("model=llava-7b", f"model.id={base or self.folder / 'model'}", "model.name=tiny"),
            *("model.dtype=float32", "model.budget=6", f"data.path={data}/train.json"),
            *(f"data.held_out={data}/test.json", f"data.image_folder={data}/images"),
            *("data.fraction=1.0", "data.num_workers=0", "optim.lr=1e-2", "optim.epochs=100"),
            *(f"optim.max_steps={NUM_STEPS}", "save_every=1", "batch.size=8", "evaluate.questions=0"),
            *("track=none", f"runs={self.runs}", f"name={name}", *more),
        ]

    @property
    def variables(self) -> dict[str, str]:
        """The variables of all commands: prepared data lies in this world, and no hub is asked."""
        return {"VZIP_DATA": str(self.folder / "vzip"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def begin(self, arguments: Iterable[str]) -> WarmScript:
        """Begin a script in a warm process."""
        script = WarmScript([str(word) for word in arguments], environment(**self.variables))
        self._scripts.append(script)
        return script

    def hooked(self, step: int, code: str, *, ranks: tuple[int, ...] = (0, 1)) -> Path:
        """Write a script that tunes, and runs some code on some ranks before a step, counted from 1."""
        script = self.folder / "hooked.py"
        script.write_text(HOOKED.format(root=str(ROOT), step=step, code=code, ranks=ranks))
        return script

    def begin_tune(
        self, settings: list[str], *, ranks: int = 1, script: str | Path = "train/tune.py"
    ) -> list:
        """Begin a run on some ranks."""
        if ranks == 1:
            return [self.begin([str(script), *settings])]
        scripts = begin_ranks(settings, ranks=ranks, script=script, **self.variables)
        self._scripts += scripts
        return scripts

    def end(self, script: WarmScript, seconds: float = WAIT_S) -> subprocess.CompletedProcess:
        """Wait for a command. Raises if it does not end."""
        script.process.join(seconds)
        if script.process.is_alive():
            script.process.kill()
            raise AssertionError(f"no end after {seconds} s")
        self._scripts.remove(script)
        return script.wait()

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess:
        """Run a script to its end."""
        return self.end(self.begin(map(str, arguments)))

    def tune(self, settings: list[str], *, ranks: int = 1) -> subprocess.CompletedProcess:
        """Run the recipe to its end, and return the result of rank 0."""
        results = [self.end(script) for script in self.begin_tune(settings, ranks=ranks)]
        return results[0]

    def reference(self, *more: str, ranks: int = 1) -> Path:
        """Return the folder of a run that nobody disturbs, with some settings."""
        key = (*more, f"ranks={ranks}")
        if key not in self._references:
            name = f"reference-{len(self._references)}"
            done = self.tune(self.settings(name, *more), ranks=ranks)
            assert done.returncode == 0, done.stderr[-600:]
            self._references[key] = self.runs / name
        return self._references[key]

    def stopped(self, name: str) -> Path:
        """Return the folder of a new run that was killed after 4 steps, and has saved them."""
        template = self.folder / "stopped"
        if not template.exists():
            (script,) = self.begin_tune(self.settings("stopped"))
            self.wait_for_steps(self.runs / "stopped", 4, [script])
            script.process.kill()
            script.process.join()
            (self.runs / "stopped").rename(template)

        # The name of a run is no part of what it computes.
        return Path(shutil.copytree(template, self.runs / name, symlinks=True))

    def wait_for_steps(self, run: Path, count: int, scripts: list[WarmScript]) -> None:
        """Wait until a run has logged some steps, or has ended."""
        file = run / "metrics.jsonl"
        end = time.monotonic() + WAIT_S
        while all(script.process.is_alive() for script in scripts):
            if file.is_file() and file.read_bytes().count(b"\n") >= count:
                return
            assert time.monotonic() < end, f"no step {count} after {WAIT_S} s"
            time.sleep(0.01)

    def clean_up(self) -> None:
        """End the processes that a trial has left."""
        for script in self._scripts:
            script.process.kill()
        self._scripts.clear()


def check_end(done: subprocess.CompletedProcess, *codes: int) -> None:
    """Check that a command ended with one of some codes, and never with a traceback."""
    shown = f"{done.stdout[-300:]} {done.stderr[-500:]}"
    assert "Traceback" not in done.stdout + done.stderr, f"traceback, exit code {done.returncode}: {shown}"
    assert done.returncode in codes, f"exit code {done.returncode}: {shown}"
    assert done.returncode == 0 or "error:" in done.stderr, f"no message: {shown}"


def check_same_bits(run: Path, reference: Path) -> None:
    """Check that a run has ended as another one, and has left nothing else."""
    assert metrics(run) == metrics(reference), "other losses or gradient norms"
    projectors = [(folder / "projector.safetensors").read_bytes() for folder in (run, reference)]
    assert projectors[0] == projectors[1], "another projector"
    left = [path.name for path in run.rglob("*") if path.name.endswith(".vzip-tmp") or path.name == "state"]
    assert left == [], f"left behind: {left}"


def module(name: str, *arguments: str | Path) -> list[str]:
    """Return the words of `python -m NAME ...`, for `World.run`."""
    return ["-m", name, *map(str, arguments)]
