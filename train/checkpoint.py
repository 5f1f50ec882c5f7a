"""A run's folder: what it is, its resumable state, what was trained, its results.

`runs/NAME/` holds config.yaml, env.json, metrics.jsonl, manifest.json, projector.safetensors, meta.json, result.json, wandb/
and pictures; while it trains, also state/.
"""

import json
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data.paths import atomic_write, write_json
from train.config import identity, run_name
from train.engine import Engine
from train.hardware import best_device, current_commit, current_environment
from train.ranks import broadcast_from_rank0
from vzip import UserError
from vzip.runs.projector import ADAPTER, save_checkpoint
from vzip.templates.encode import Template

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "hydra-core", "wandb", "safetensors")
BYTES_PER_PARAMETER = 28
"""Of disk: two resumable states of float32 weights and AdamW moments, and the result."""


def _command() -> list[str]:
    """What starts this run alone again, also where it is one of a sweep."""
    job = HydraConfig.get() if HydraConfig.initialized() else None
    if job is None or job.mode is not RunMode.MULTIRUN:
        return sys.argv
    return [
        sys.argv[0],
        *job.overrides.task,
        "hydra.mode=RUN",
    ]  # RUN: also where it is an experiment that makes it a sweep


def environment_record(cfg: DictConfig, *, world_size: int) -> dict[str, Any]:
    """What a run ran on: date, commit, versions, hardware, seed."""
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


def _differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """The settings that differ, as "optim.lr=1e-05 there, 2e-05 now"."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differences(one, other, f"{path}{key}.")
        elif one != other:
            found.append(f"{path}{key}={one} there, {other} now")
    return found


class RunFolder:
    """The folder of one run. Rank 0 writes; all ranks call the same methods.

    Raises:
        UserError: a folder of that name holds another run, or the disk is full.
    """

    def __init__(self, cfg: DictConfig, *, rank: int) -> None:
        self.cfg, self.main = cfg, rank == 0
        self.path = Path(cfg.runs) / run_name(cfg)
        self.state = self.path / "state"
        self._refuse_other_run()

    def _refuse_other_run(self) -> None:
        config = self.path / "config.yaml"
        if not config.is_file():
            if self.cfg.fresh and self.path.is_dir() and any(self.path.iterdir()):  # it would be deleted
                raise UserError(f"fresh=true: {self.path} is there and holds no run; choose another name=...")
            return
        if not self.cfg.fresh and (
            changed := _differences(identity(OmegaConf.load(config)), identity(self.cfg))
        ):
            raise UserError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}); choose another name=..., or start over "
                f"with fresh=true"
            )

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json of a finished run; None if it will be started over."""
        path = self.path / "result.json"
        return broadcast_from_rank0(
            json.loads(path.read_text()) if path.is_file() and not self.cfg.fresh else None
        )

    def begin(self, manifest: dict[str, Any], *, num_trainable: int, world_size: int) -> None:
        """Write what the run is, before it trains; with `fresh` what was there is deleted only now, where all else is right.

        Raises UserError if the disk has no room for its states, or the rows are others than before.
        """
        if self.main:
            self._begin(manifest, num_trainable=num_trainable, world_size=world_size)
        deepspeed.comm.barrier()

    def _begin(self, manifest: dict[str, Any], *, num_trainable: int, world_size: int) -> None:
        if self.cfg.fresh and self.path.exists():
            shutil.rmtree(self.path)
        recorded = self.path / "manifest.json"
        if recorded.is_file() and (before := json.loads(recorded.read_text())["hash"]) != manifest["hash"]:
            raise UserError(
                f"{self.path} was begun on other rows (hash {before[:12]}, now {manifest['hash'][:12]}): the data has changed "
                f"since; bring it back, choose another name=..., or start over with fresh=true"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        needed = 100_000_000 + BYTES_PER_PARAMETER * num_trainable
        if (free := shutil.disk_usage(self.path).free) < needed:
            raise UserError(
                f"{self.path} has {free / 1e6:,.0f} MB free, a run needs {needed / 1e6:,.0f} MB; free some, or set runs=... "
                f"to a folder on another disk"
            )
        with atomic_write(self.path / "config.yaml") as scratch:
            scratch.write_text(OmegaConf.to_yaml(self.cfg, resolve=True))
        write_json(self.path / "env.json", environment_record(self.cfg, world_size=world_size))
        write_json(self.path / "manifest.json", manifest)

    def save_state(self, engine: Engine, step: int) -> None:
        """Save the state after `step` steps, then delete older ones."""
        engine.save(str(self.state), tag=f"step{step}", state={"step": step})
        deepspeed.comm.barrier()
        if self.main:
            for old in self.state.glob("step*"):
                if old.name != f"step{step}":
                    shutil.rmtree(old)

    def resume(self, engine: Engine) -> int:
        """Load the newest state into the engine: how many steps it has done, 0 without one."""
        if not broadcast_from_rank0((self.state / "latest").is_file()):
            return 0
        return int(engine.load(str(self.state))["step"])

    def save_trained(self, engine: Engine, meta: dict[str, Any]) -> None:
        """Write projector.safetensors and meta.json, and the adapter in peft's format where there is LoRA."""
        projector, adapter = engine.weights()
        if not self.main:
            return
        if adapter:
            engine.trainable.peft_model.save_pretrained(self.path / ADAPTER, state_dict=adapter)
        save_checkpoint(self.path, projector, meta)

    def trained_meta(
        self, engine: Engine, template: Template, manifest: dict[str, Any], num_image_tokens: int
    ) -> dict[str, Any]:
        """The part of meta.json that says how the projector was trained."""
        return {
            "num_image_tokens": num_image_tokens,
            "template": asdict(template),
            "dtype": self.cfg.model.dtype,
            "adapter": engine.trainable.peft_model is not None,
            "trained": list(engine.trainable.parameters),
            "data": {key: manifest[key] for key in ("hash", "num_rows", "fraction", "seed")},
            "commit": current_commit(),
        }

    def answers(self, row: str) -> list[dict[str, Any]] | None:
        """The answers of an evaluation row, where an interrupted run has them already."""
        path = self.path / f"answers_{row}.json"
        return broadcast_from_rank0(json.loads(path.read_text()) if path.is_file() else None)

    def save_answers(self, row: str, answers: list[dict[str, Any]]) -> None:
        if self.main:
            write_json(self.path / f"answers_{row}.json", answers)

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, which makes the run a finished one, and delete the resumable state."""
        if self.main:
            write_json(self.path / "result.json", result)
            shutil.rmtree(self.state, ignore_errors=True)
