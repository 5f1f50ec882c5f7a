"""Where the numbers of a run go: metrics.jsonl always, wandb beside it."""

import json
import os
import resource
import secrets
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data.paths import atomic_write
from vzip.runs.projector import META, WEIGHTS, read_meta

INIT_TIMEOUT, FINISH_TIMEOUT = 20, 300
"""Seconds that wandb may take to begin a run, and to send what is left at its end."""


def memory_gb(device: torch.device) -> float:
    """Peak memory so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9


def _has_key() -> bool:
    """Whether wandb has credentials where it looks for them. Raises wandb.errors.AuthenticationError for malformed ones."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


def _id(folder: Path) -> str:
    """The run's own among all of the project, kept in its folder: resumed it is the same, started over another."""
    path = folder / "wandb" / "id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as scratch:
            scratch.write_text(secrets.token_hex(4))
    return path.read_text()


def _begin(folder: Path, cfg: DictConfig) -> Any:
    """The run in wandb: online where there are credentials that work and a network, else offline."""
    import wandb

    begin = partial(
        wandb.init,
        project=cfg.track.project,
        name=folder.name,
        id=_id(folder),
        resume="allow",
        dir=folder,
        config=OmegaConf.to_container(cfg, resolve=True),
        settings=wandb.Settings(
            silent=True, init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, finish_timeout_raises=True
        ),
    )
    mode = os.environ.get("WANDB_MODE") or "online"
    try:
        return begin(mode="offline" if mode == "online" and not _has_key() else mode)
    except wandb.errors.Error as error:
        print(f"wandb can't be reached, the run is tracked offline: {' '.join(str(error).split())}")
        wandb.teardown()  # which lets go of the run's id
        return begin(mode="offline")


class Tracker:
    """Writes on rank 0, does nothing on the others.

    Args:
        folder: the run's folder.
        cfg: the run's settings.
        rank: of this process.
    """

    def __init__(self, folder: Path, cfg: DictConfig, *, rank: int) -> None:
        self.folder, self.path, self.main = folder, folder / "metrics.jsonl", rank == 0
        self.wandb: Any = None
        if self.main and cfg.track.wandb:
            self.wandb = _begin(folder, cfg)

    def __str__(self) -> str:
        return f"wandb {self.wandb.url or 'offline'}" if self.wandb else "no wandb"

    def forget_from(self, step: int) -> None:
        """Drop the metrics of steps that will be run again."""
        if self.main and self.path.is_file():
            whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] < step]
            with atomic_write(self.path) as scratch:
                scratch.write_text("".join(kept))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.main:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def log_results(
        self, rows: list[dict[str, Any]], answers: list[dict[str, Any]], pictures: list[Path]
    ) -> None:
        """To wandb, what on disk are files of their own: scores, sample answers, pictures of kept tokens, and the projector."""
        if not self.wandb:
            return
        import wandb

        for row in rows:
            for kind, value in row["metrics"].items():
                self.wandb.summary[f"eval/{row['name']}_{kind}"] = value
        kinds = list(rows[0]["metrics"]) if rows else []
        scores = wandb.Table(columns=["row", "visual_tokens", "questions", *kinds])
        for row in rows:
            scores.add_data(
                row["name"], row["num_visual_tokens"], row["num_questions"], *row["metrics"].values()
            )
        columns = ["row", "image", "question", "expected", "answer"]
        samples = wandb.Table(columns=columns, data=[[answer[key] for key in columns] for answer in answers])
        shown = {"eval/scores": scores, "eval/answers": samples}
        self.wandb.log(shown | {"eval/kept_tokens": [wandb.Image(str(path)) for path in pictures]})
        self._log_projector()

    def _log_projector(self) -> None:
        import wandb

        artifact = wandb.Artifact(f"projector-{self.wandb.id}", type="model", metadata=read_meta(self.folder))
        for name in (WEIGHTS, META, "config.yaml"):
            artifact.add_file(str(self.folder / name))
        self.wandb.log_artifact(artifact)

    def finish(self) -> None:
        if not self.wandb:
            return
        kept = Path(self.wandb.dir).parent
        try:
            self.wandb.finish()
        except TimeoutError:
            print(
                f"wandb has not got all of the run in {FINISH_TIMEOUT} s; `wandb sync {kept}` sends the rest"
            )
