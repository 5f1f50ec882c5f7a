"""Where the numbers of a run go: metrics.jsonl always, wandb beside it."""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vzip.io import META, WEIGHTS, read_meta


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
            import wandb

            mode = os.environ.get("WANDB_MODE") or "online"
            if mode == "online" and not _has_key():
                mode = "offline"
            self.wandb = wandb.init(
                project=cfg.track.project,
                name=folder.name,
                id=folder.name,
                resume="allow",
                dir=folder,
                mode=mode,
                config=OmegaConf.to_container(cfg, resolve=True),
                settings=wandb.Settings(silent=True),
            )

    def forget_from(self, step: int) -> None:
        """Drop the metrics of steps that will be run again."""
        if self.main and self.path.is_file():
            whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] < step]
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(self.path)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.main:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def log_results(self, rows: list[dict[str, Any]], answers: list[dict[str, Any]], pictures: list[Path]) -> None:
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
            scores.add_data(row["name"], row["num_visual_tokens"], row["num_questions"], *row["metrics"].values())
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
        if self.wandb:
            self.wandb.finish()
