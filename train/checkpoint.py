"""The folder of a run: settings, environment, resumable state, trained projector, results.

`runs/NAME/` holds config.yaml, env.json, manifest.json, metrics.jsonl, answers_SETTING.json,
projector.safetensors, meta.json, result.json, wandb/ and pictures. While the run trains it also
holds state/. Its lock lies beside it, because starting over moves the folder away.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from data.locks import locked
from train.config import identity, own_settings, run_name
from train.engine import Engine
from train.hardware import best_device, current_commit, current_environment
from train.ranks import broadcast_from_rank0, is_main, on_rank0
from train.runs import FinishedRun
from train.state import PARTS, StateFolder
from vzip import UserError
from vzip.checkpoints.shards import check_all_finite
from vzip.files import atomic_write, read_json_object, write_json
from vzip.redact import redacted_values
from vzip.reducers import Reducer
from vzip.runs.meta import ADAPTER
from vzip.runs.projector import save_checkpoint
from vzip.templates.encode import Template

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "hydra-core", "wandb", "safetensors")

# Disk space per trainable parameter: float32 weights and AdamW's moments of the two resumable states
# that are kept and of the one that is being written, and the result.
BYTES_PER_PARAMETER = 40

# Disk space for everything else.
OTHER_BYTES = 100_000_000


def environment_record(cfg: DictConfig, *, world_size: int) -> dict[str, Any]:
    """Collect the content of env.json: date, commit, command, versions, hardware and seed."""
    environment = current_environment(best_device())
    return {
        "date": environment.date,
        "commit": environment.commit,
        "modified_files": environment.modified_files,
        "command": _command(),
        "python": environment.python,
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": {
            "device": environment.device,
            "num_cpus": environment.num_cpus,
            "world_size": world_size,
        },
        "seed": cfg.seed,
    }


def _command() -> list[str]:
    """Return the command that starts this run again, without the other runs of a sweep."""
    # Without Hydra, or without a sweep, it is the command as it was typed.
    job = HydraConfig.get() if HydraConfig.initialized() else None
    if job is None or job.mode is not RunMode.MULTIRUN:
        return sys.argv

    # The command of a sweep would start all its runs: take the overrides of this run instead.
    # An experiment may itself ask for a sweep, so the mode is set too.
    return [sys.argv[0], *job.overrides.task, "hydra.mode=RUN"]


def settings_without_secrets(cfg: DictConfig) -> str:
    """Return the settings as YAML, all values resolved, without the secrets of addresses.

    Where data comes from is no part of a run, so a resumed run still compares equal.
    """
    return OmegaConf.to_yaml(OmegaConf.create(redacted_values(OmegaConf.to_container(cfg, resolve=True))))


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """List the settings that differ, each as "optim.lr=1e-05 there, 2e-05 now"."""
    changed = []
    # Go through the keys of both, each once: a setting may be new or gone.
    for key in dict.fromkeys([*before, *now]):
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _changed_settings(old, new, f"{path}{key}.")
        elif old != new:
            changed.append(f"{path}{key}={old} there, {new} now")
    return changed


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raise the OSError that is behind an error of safetensors, for example of a full disk."""
    try:
        yield
    except SafetensorError as error:
        # The library has the number in its text only: "... (os error 28)".
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error


@contextmanager
def locked_run(cfg: DictConfig) -> Iterator["RunFolder"]:
    """Open the folder of a run, and keep other processes from writing it until the block ends.

    Commands that only read a run are not hindered.

    Raises:
        UserError: another process writes this run, the folder can't be written, or it holds
            something else.
    """
    with ExitStack() as stack:
        on_rank0(lambda: _lock(cfg, stack))
        yield RunFolder(cfg)


def _lock(cfg: DictConfig, stack: ExitStack) -> None:
    """Lock the folder of a run until the stack is closed."""
    # Two paths to one folder have one lock, so links are followed.
    path = Path(cfg.runs) / run_name(cfg)
    folder = path.resolve()
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(lock, wait=False, busy=f"{path} is being written"))
    except OSError as error:
        raise UserError(
            f"{path.parent} can't be written ({error}); set runs=... to another folder"
        ) from error


class RunFolder:
    """The folder of one run. All ranks call the same methods, and rank 0 writes.

    Args:
        cfg: the run's settings.

    Raises:
        UserError: the folder holds a run with other settings, or it is damaged.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.path = Path(cfg.runs) / run_name(cfg)
        self.state = StateFolder(self.path / "state")
        self.before = self.path.with_name(f"{self.path.name}.before-fresh")
        on_rank0(self._check_same_run)

    def _check_same_run(self) -> None:
        """Raise UserError if the folder holds another run, or something that is no run."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"{self.path} is no folder; choose another name=..., or move it away")
        if self.cfg.fresh and self.path.is_symlink():
            raise UserError(
                f"fresh=true: {self.path} is a link to {self.path.resolve()}; choose another name=..., or "
                f"delete the link"
            )

        if not (self.path / "config.yaml").is_file():
            # fresh=true deletes the folder, which must not happen to anything but a run.
            if self.cfg.fresh and self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(f"fresh=true: {self.path} exists and holds no run; choose another name=...")
            return

        # fresh=true starts over, so the old run may have other settings.
        if self.cfg.fresh:
            return
        try:
            recorded = FinishedRun(self.path).config
        except UserError as error:
            raise UserError(
                f"{error}; restore the file, choose another name=..., or start over with fresh=true"
            ) from error

        # Only settings that change what is trained count. `own_settings` leaves out the others.
        changed = _changed_settings(own_settings(recorded), identity(self.cfg))
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}); choose another "
                f"name=..., or start over with fresh=true"
            )

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of result.json. None if the run is not finished, or starts over.

        Raises UserError if the file is damaged.
        """
        # All ranks must agree on whether to train, and only rank 0 is sure to see the file.
        is_finished = broadcast_from_rank0((self.path / "result.json").is_file() and not self.cfg.fresh)
        return on_rank0(self._read_result) if is_finished else None

    def _read_result(self) -> dict[str, Any]:
        """Read result.json of a finished run. Raises UserError if it is damaged."""
        try:
            return FinishedRun(self.path).result
        except UserError as error:
            raise UserError(
                f"{error}. If you delete result.json, the same command trains the run again"
            ) from error

    def begin(self, manifest: Mapping[str, Any], *, num_trainable: int, world_size: int) -> None:
        """Write settings, environment and data before the run trains.

        With `fresh` the old run is deleted or moved away here, after every check of the new one.

        Args:
            manifest: what the training data consists of.
            num_trainable: trainable parameters.
            world_size: ranks.

        Raises:
            UserError: the disk is too full, the training data has changed, or a file of the run is
                damaged.
        """
        on_rank0(lambda: self._begin(manifest, num_trainable=num_trainable, world_size=world_size))

    def _begin(self, manifest: Mapping[str, Any], *, num_trainable: int, world_size: int) -> None:
        """Do on rank 0 what `begin` says."""
        if self.cfg.fresh:
            self._start_over()
        self._check_same_data(manifest)
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_disk(num_trainable)

        # A later command compares its settings with these, so they must never be half written.
        with atomic_write(self.path / "config.yaml") as scratch:
            scratch.write_text(settings_without_secrets(self.cfg))
        environment = environment_record(self.cfg, world_size=world_size)
        write_json(self.path / "env.json", redacted_values(environment))
        write_json(self.path / "manifest.json", redacted_values(dict(manifest)))

    def _start_over(self) -> None:
        """Delete the old run, or keep it beside the new one if it is finished."""
        # The new run may fail in its first steps. Then the old one is still there.
        if (self.path / "result.json").is_file():
            if self.before.exists():
                shutil.rmtree(self.before)
            self.path.rename(self.before)
            print(f"the finished run is kept as {self.before} until the new one is finished", flush=True)
        elif self.path.exists():
            shutil.rmtree(self.path)

    def _check_same_data(self, manifest: Mapping[str, Any]) -> None:
        """Raise UserError if the run was begun on other examples."""
        # A new run has no manifest yet.
        recorded = self.path / "manifest.json"
        if not recorded.is_file():
            return

        advice = "restore the file, choose another name=..., or start over with fresh=true"
        before = read_json_object(recorded, advice=advice)
        for key, what in (("hash", "examples"), ("media_hash", "pictures")):
            then = str(before.get(key))
            now = str(manifest.get(key))
            if then != now:
                raise UserError(
                    f"{self.path} was begun on other {what} (hash {then[:12]}, now {now[:12]}): the data "
                    f"has changed since; restore it, choose another name=..., or start over with fresh=true"
                )

    def _check_disk(self, num_trainable: int) -> None:
        """Raise UserError if the disk can't hold the run."""
        # States that are already there are replaced.
        needed = OTHER_BYTES + BYTES_PER_PARAMETER * num_trainable
        free = shutil.disk_usage(self.path).free + self.state.num_bytes()
        if free < needed:
            raise UserError(
                f"{self.path} has {free / 1e6:,.0f} MB free, a run needs {needed / 1e6:,.0f} MB; "
                f"free some space, or set runs=... to a folder on another disk"
            )

    def save_state(self, engine: Engine, num_done: int) -> None:
        """Save the state after `num_done` steps, then delete those that are not needed any more.

        Raises:
            UserError: the state has values that are not finite.
            OSError: the disk is full, or can't be written. The states before it stay.
        """
        on_rank0(lambda: self.state.begin(num_done))
        checksums = {}
        for part in PARTS:
            # All ranks take part in gathering, and rank 0 writes.
            tensors = engine.gather(part)
            checksums[part] = on_rank0(partial(self.state.write, num_done, part, tensors))
        on_rank0(lambda: self.state.finish(num_done, checksums))

    def resume(self, engine: Engine) -> int:
        """Load the newest whole state, if there is one. Return the number of steps that are done.

        The state may come from another number of ranks.

        Raises:
            UserError: there are states, and none of them is whole.
        """
        # Rank 0 decides for all: other hosts may not see its files.
        num_done = on_rank0(lambda: self.state.newest(engine.shapes()))
        if num_done:
            for part in PARTS:
                tensors = self.state.read(num_done, part) if is_main() else {}
                engine.restore(part, tensors)
        return num_done

    def save_trained(
        self,
        engine: Engine,
        meta: Mapping[str, Any],
        *,
        reducer: Reducer,
        template: Template,
        manifest: Mapping[str, Any],
    ) -> None:
        """Write projector.safetensors and meta.json. With LoRA, also write the adapter for peft.

        Args:
            engine: holds the trained weights.
            meta: what the projector belongs to: base model and reducers.
            reducer: the first of these reducers.
            template: the format of the conversations.
            manifest: what the training data consists of.
        """
        # Under ZeRO 3 all ranks take part in gathering the weights.
        projector, adapter = engine.weights()
        peft_model = engine.trainable.peft_model

        def write() -> None:
            if adapter:
                check_all_finite(adapter, source=f"the tuned adapter of {self.path}", advice="lower optim.lr")
                with _os_errors():
                    peft_model.save_pretrained(self.path / ADAPTER, state_dict=adapter)

            # What loading and a model card need to know about the training.
            how_trained = {
                "num_image_tokens": engine.family.num_image_tokens(reducer),
                "template": asdict(template),
                "dtype": self.cfg.model.dtype,
                "adapter": peft_model is not None,
                "trained": list(engine.trainable.parameters),
                "data": {key: manifest[key] for key in ("hash", "num_rows", "fraction", "seed")},
                "commit": current_commit(),
            }
            with _os_errors():
                save_checkpoint(self.path, projector, {**meta, **how_trained})

        on_rank0(write)

    def finish(self, rows: list[dict[str, Any]], *, num_steps: int, manifest: Mapping[str, Any]) -> None:
        """Write result.json, which marks the run as finished, and delete the resumable state.

        Args:
            rows: the scores of each setting.
            num_steps: steps that the run took.
            manifest: what the training data consists of.
        """
        result = {
            "rows": rows,
            "num_steps": num_steps,
            "manifest": manifest["hash"],
            "seed": self.cfg.seed,
        }
        on_rank0(lambda: self._finish(result))

    def _finish(self, result: dict[str, Any]) -> None:
        """Write result.json, and delete what a finished run does not need."""
        write_json(self.path / "result.json", result)
        for folder in (self.state.path, self.before):
            shutil.rmtree(folder, ignore_errors=True)

    def replace_rows(self, rows: list[dict[str, Any]]) -> None:
        """Replace the scores in result.json of a finished run."""
        on_rank0(lambda: write_json(self.path / "result.json", {**self._read_result(), "rows": rows}))
