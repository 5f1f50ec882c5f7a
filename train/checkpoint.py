"""The folder of a run: settings, environment, resumable state, trained projector, results.

`runs/NAME/` holds config.yaml, env.json, manifest.json, metrics.jsonl, answers_SETTING.json,
projector.safetensors, meta.json, result.json, wandb/ and pictures. While the run trains it also
holds state/.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from train.config import identity, run_name
from train.engine import Engine
from train.hardware import best_device, current_commit, current_environment
from train.ranks import barrier, broadcast_from_rank0, is_main
from vzip import UserError
from vzip.files import atomic_write, write_json
from vzip.redact import redacted_values
from vzip.reducers import Reducer
from vzip.runs.projector import ADAPTER, save_checkpoint
from vzip.templates.encode import Template

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "hydra-core", "wandb", "safetensors")

# Disk space per trainable parameter: two resumable states of float32 weights and AdamW's moments,
# and the result.
BYTES_PER_PARAMETER = 28

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
    # The keys of both, each once, in their order: a setting may be new or gone.
    for key in dict.fromkeys([*before, *now]):
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _changed_settings(old, new, f"{path}{key}.")
        elif old != new:
            changed.append(f"{path}{key}={old} there, {new} now")
    return changed


class RunFolder:
    """The folder of one run. All ranks call the same methods, and rank 0 writes.

    Args:
        cfg: the run's settings.

    Raises:
        UserError: the folder holds a run with other settings.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.path = Path(cfg.runs) / run_name(cfg)
        self.state = self.path / "state"
        self._check_same_run()

    def _check_same_run(self) -> None:
        """Raise UserError if the folder holds another run, or something that is no run."""
        config = self.path / "config.yaml"
        if not config.is_file():
            # fresh=true deletes the folder, which must not happen to anything but a run.
            if self.cfg.fresh and self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(f"fresh=true: {self.path} exists and holds no run; choose another name=...")
            return

        # fresh=true throws the old run away, so it may have other settings.
        if self.cfg.fresh:
            return

        # Only settings that change what is trained count. `identity` leaves out the others.
        changed = _changed_settings(identity(OmegaConf.load(config)), identity(self.cfg))
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}); choose another "
                f"name=..., or start over with fresh=true"
            )

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of result.json. None if the run is not finished, or starts over."""
        path = self.path / "result.json"
        is_finished = path.is_file() and not self.cfg.fresh

        # All ranks must agree on whether to train, and only rank 0 is sure to see the file.
        return broadcast_from_rank0(json.loads(path.read_text()) if is_finished else None)

    def begin(self, manifest: Mapping[str, Any], *, num_trainable: int, world_size: int) -> None:
        """Write settings, environment and data before the run trains.

        With `fresh` the old run is deleted here, after every check of the new one.

        Args:
            manifest: what the training data consists of.
            num_trainable: trainable parameters.
            world_size: ranks.

        Raises:
            UserError: the disk is too full, or the training data has changed.
        """
        if is_main():
            if self.cfg.fresh and self.path.exists():
                shutil.rmtree(self.path)
            self._check_same_data(manifest)
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_disk(num_trainable)

            # A later command compares its settings with these, so they must never be half written.
            with atomic_write(self.path / "config.yaml") as scratch:
                scratch.write_text(settings_without_secrets(self.cfg))
            environment = environment_record(self.cfg, world_size=world_size)
            write_json(self.path / "env.json", redacted_values(environment))
            write_json(self.path / "manifest.json", redacted_values(dict(manifest)))

        # The other ranks write into this folder, so they wait until it is there.
        barrier()

    def _check_same_data(self, manifest: Mapping[str, Any]) -> None:
        """Raise UserError if the run was begun on other examples."""
        # A new run has no manifest yet.
        recorded = self.path / "manifest.json"
        if not recorded.is_file():
            return

        before = json.loads(recorded.read_text())["hash"]
        now = manifest["hash"]
        if before != now:
            raise UserError(
                f"{self.path} was begun on other examples (hash {before[:12]}, now {now[:12]}): the "
                f"data has changed since; restore it, choose another name=..., or start over with "
                f"fresh=true"
            )

    def _check_disk(self, num_trainable: int) -> None:
        """Raise UserError if the disk can't hold the run."""
        needed = OTHER_BYTES + BYTES_PER_PARAMETER * num_trainable
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"{self.path} has {free / 1e6:,.0f} MB free, a run needs {needed / 1e6:,.0f} MB; "
                f"free some space, or set runs=... to a folder on another disk"
            )

    def save_state(self, engine: Engine, num_done: int) -> None:
        """Save the state after `num_done` steps, then delete older states."""
        tag = f"step{num_done}"
        engine.save(str(self.state), tag=tag, state={"step": num_done})
        barrier()

        # Delete the old state only now, when every rank has written its part of the new one.
        if is_main():
            for folder in self.state.glob("step*"):
                if folder.name != tag:
                    shutil.rmtree(folder)

    def resume(self, engine: Engine) -> int:
        """Load the newest state, if there is one. Return the number of steps that are done."""
        # Rank 0 decides for all: if only some ranks loaded, they would wait for the others forever.
        has_state = broadcast_from_rank0((self.state / "latest").is_file())
        if not has_state:
            return 0
        return int(engine.load(str(self.state))["step"])

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
        if not is_main():
            return

        peft_model = engine.trainable.peft_model
        if adapter:
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
        save_checkpoint(self.path, projector, {**meta, **how_trained})

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
        if is_main():
            write_json(self.path / "result.json", result)
            shutil.rmtree(self.state, ignore_errors=True)

    def replace_rows(self, rows: list[dict[str, Any]]) -> None:
        """Replace the scores in result.json of a finished run."""
        if is_main():
            path = self.path / "result.json"
            write_json(path, {**json.loads(path.read_text()), "rows": rows})
