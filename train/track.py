"""Where the numbers of a run go: always to metrics.jsonl, and to wandb if `track=wandb`."""

import json
import os
import resource
import secrets
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from train.evaluation.questions import SettingAnswers
from vzip.files import atomic_write
from vzip.redact import redacted, redacted_values
from vzip.runs.meta import META, WEIGHTS, read_meta

# Seconds that wandb may take to start a run.
INIT_TIMEOUT = 20

# Seconds that wandb may take to send the rest at the end of a run.
FINISH_TIMEOUT = 300

# Answers of each setting that wandb shows.
NUM_SAMPLES = 4


def memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9

    # macOS counts in bytes, Linux in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return peak * unit / 1e9


def _step_of(line: bytes) -> int | None:
    """Return the step that a line of metrics.jsonl belongs to; None if the line is damaged."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_whole = line.endswith(b"\n") and isinstance(metrics, dict)
    step = metrics.get("step") if is_whole else None
    return step if type(step) is int else None


class Tracker:
    """Writes the numbers of a run on rank 0, and does nothing on the other ranks.

    Args:
        folder: the run's folder.
        cfg: the run's settings.
        rank: number of this process.
    """

    def __init__(self, folder: Path, cfg: DictConfig, *, rank: int) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.is_main = rank == 0
        self.sends_media = bool(cfg.track.get("media"))
        self.wandb: Any = None
        if self.is_main and cfg.track.wandb:
            self.wandb = _start_wandb(folder, cfg)

    def __str__(self) -> str:
        return f"wandb {self.wandb.url or 'offline'}" if self.wandb else "no wandb"

    def forget_from(self, step: int) -> None:
        """Drop the metrics from a step on, because a resumed run takes these steps again."""
        if not self.is_main or not self.path.is_file():
            return

        # A kill may have cut the last line short, and a power cut may leave anything.
        valid = []
        num_damaged = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            line_step = _step_of(line)
            if line_step is None:
                num_damaged += line.endswith(b"\n")
            elif line_step < step:
                valid.append(line)
        if num_damaged:
            print(f"{self.path}: {num_damaged} damaged line(s) left out", flush=True)

        # A kill during the writing must not lose the metrics of all steps.
        with atomic_write(self.path) as scratch:
            scratch.write_bytes(b"".join(valid))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Add the metrics of a step."""
        if not self.is_main:
            return

        # The file is closed after each step, so that a kill loses no step that is finished.
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def log_results(self, settings: Sequence[SettingAnswers], pictures: Sequence[Path]) -> None:
        """Send scores and the projector to wandb, and with `track.media` also answers and pictures.

        Args:
            settings: the answers of each setting.
            pictures: files that show the tokens that the reducer keeps.
        """
        if not self.wandb:
            return

        # wandb takes seconds to import, and runs without it need not wait.
        import wandb

        # The scores, each under its own name in the run's summary.
        rows = [setting.row for setting in settings]
        for row in rows:
            for kind, share in row["metrics"].items():
                self.wandb.summary[f"eval/{row['name']}_{kind}"] = share

        # The same scores as a table.
        kinds = list(rows[0]["metrics"]) if rows else []
        scores = wandb.Table(columns=["row", "visual_tokens", "questions", *kinds])
        for row in rows:
            shares = row["metrics"].values()
            scores.add_data(row["name"], row["num_visual_tokens"], row["num_questions"], *shares)

        # Pictures and texts may be private, so they are sent only if the user says so.
        media = _media(settings, pictures) if self.sends_media else {}
        self.wandb.log({"eval/scores": scores, **media})

        # Send the files that `vzip.load` needs, so that others can use the projector.
        metadata = redacted_values(read_meta(self.folder))
        projector = wandb.Artifact(f"projector-{self.wandb.id}", type="model", metadata=metadata)
        for name in (WEIGHTS, META, "config.yaml"):
            projector.add_file(str(self.folder / name))
        self.wandb.log_artifact(projector)

    def finish(self) -> None:
        """Wait until wandb has received everything, but not forever."""
        if not self.wandb:
            return

        # wandb keeps everything in this folder too, so that nothing is lost without a network.
        folder = Path(self.wandb.dir).parent
        try:
            self.wandb.finish()
        except TimeoutError:
            print(
                f"wandb did not finish uploading within {FINISH_TIMEOUT} s; "
                f"`wandb sync {folder}` sends the rest"
            )


def _media(settings: Sequence[SettingAnswers], pictures: Sequence[Path]) -> dict[str, Any]:
    """Return some questions with the answers of each setting, and pictures of kept tokens."""
    import wandb

    # A few answers of each setting show what a score means.
    columns = ["image", "question", "expected", "answer"]
    samples = wandb.Table(columns=["row", *columns])
    for setting in settings:
        for answer in setting.answers[:NUM_SAMPLES]:
            samples.add_data(setting.name, *(answer[column] for column in columns))

    images = [wandb.Image(str(path)) for path in pictures]
    return {"eval/answers": samples, "eval/kept_tokens": images}


def _start_wandb(folder: Path, cfg: DictConfig) -> Any:
    """Start the run in wandb: online with working credentials and a network, else offline."""
    import wandb

    # A slow network must neither delay the training for long nor end it.
    settings = wandb.Settings(
        silent=True,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        finish_timeout_raises=True,
        # It would send the command line, which may hold secrets, and names of the user and the host.
        x_disable_meta=True,
    )

    # A resumed run continues its curves in wandb, because it has the same id.
    start = partial(
        wandb.init,
        project=cfg.track.project,
        name=folder.name,
        id=_wandb_id(folder),
        resume="allow",
        dir=folder,
        config=redacted_values(OmegaConf.to_container(cfg, resolve=True)),
        settings=settings,
    )

    # The user's own WANDB_MODE is respected.
    mode = os.environ.get("WANDB_MODE") or "online"
    try:
        # Without a key, wandb would prompt for one.
        if mode == "online" and not _has_key():
            mode = "offline"
        return start(mode=mode)
    except wandb.errors.Error as error:
        reason = redacted(" ".join(str(error).split()))
        print(f"wandb can't be reached, the run is tracked offline: {reason}")

        # Without teardown, the failed start would keep the run's id.
        wandb.teardown()
        return start(mode="offline")


def _has_key() -> bool:
    """Tell whether wandb finds credentials. Raises wandb.errors.Error for malformed ones."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


def _wandb_id(folder: Path) -> str:
    """Return the run's id in wandb. Resuming keeps it, and starting over makes a new one."""
    # The id lies in the run's folder, which starting over deletes.
    path = folder / "wandb" / "id"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as scratch:
            scratch.write_text(secrets.token_hex(4))
    return path.read_text()
