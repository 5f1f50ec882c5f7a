"""Held-out questions as a file that lmms-eval's task `vzip_held_out` reads, with their pictures inside."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from data.conversations import Conversation
from data.fetch.videos import read_frames
from data.paths import ROOT, atomic_write, data_dir, write_json
from scripts.evaluate.tasks import TASK
from train import config
from train.examples import held_out_conversations
from vzip import UserError
from vzip.templates.encode import IMAGE, VIDEO

TEMPLATE = Path(__file__).parent / "held_out_task" / "held_out.yaml"
FEATURES = datasets.Features(
    {
        "images": datasets.List(datasets.Image()),
        "videos": datasets.List(datasets.List(datasets.Image())),
        "turns": datasets.Value("string"),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "kind": datasets.Value("string"),
    }
)
"""Of a question: its pictures and videos (frames), those of the turns before it among them; these turns, in JSON, as
[[question, answer], ...]; the question, with its placeholders; the true answer; the question's type."""


def _run_config(run: Path | None) -> DictConfig:
    """Those of a run that has held-out questions, else the embedded default's. Raises UserError if the questions are gone."""
    config.register()
    own = OmegaConf.load(run / "config.yaml") if run is not None and (run / "config.yaml").is_file() else None
    if isinstance(own, DictConfig) and config.asks_questions(own):
        cfg, way_out = own, "put the file there again"
    else:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg, way_out = compose("tune"), "`make data`, without MODEL, makes it"
    if not Path(cfg.data.held_out).expanduser().exists():
        raise UserError(f"the held-out questions, {cfg.data.held_out}, are not there; {way_out}")
    return cfg


def _png(frame: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    frame.save(buffer, format="png")
    return {"bytes": buffer.getvalue(), "path": None}


def _documents(row: Conversation, folder: Path, num_frames: int) -> Iterator[dict[str, Any]]:
    """The questions of a conversation, each with the turns before it and the media up to it, as train/evaluate.py asks them."""
    images = [{"bytes": (folder / path).read_bytes(), "path": None} for path in row.images]
    videos = [[_png(frame) for frame in read_frames(folder / path, num_frames)] for path in row.videos]
    for turn, (question, answer) in enumerate(row.turns):
        so_far = [text for text, _ in row.turns[: turn + 1]]
        yield {
            "images": images[: sum(text.count(IMAGE) for text in so_far)],
            "videos": videos[: sum(text.count(VIDEO) for text in so_far)],
            "turns": json.dumps(row.turns[:turn]),
            "question": question,
            "answer": answer,
            "kind": row.kind,
        }


def _task(cfg: DictConfig, folder: Path, documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """TASK.yaml: what differs from run to run."""
    kinds = [*sorted({document["kind"] for document in documents} - {"all"}), "all"]
    return {
        "task": TASK,
        "include": str(TEMPLATE),
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.parquet")}},
        "metric_list": [{"metric": kind, "aggregation": "mean", "higher_is_better": True} for kind in kinds],
        "generation_kwargs": {"max_new_tokens": cfg.evaluate.max_new_tokens, "until": [], "do_sample": False},
    }


def write_questions(run: Path | None) -> Path:
    """The held-out questions of a run, or, where it has none, or without a run, those of the embedded default.

    Returns:
        a folder for lmms-eval's `--include_path`, with TASK.yaml and questions.parquet; its name is a hash of the questions.

    Raises:
        UserError: their data is not there: not any more, or the embedded default was never prepared.
    """
    cfg = _run_config(run)
    images, documents = Path(cfg.data.image_folder).expanduser(), list[dict[str, Any]]()
    for row in held_out_conversations(cfg):
        documents += _documents(row, images, cfg.model.get("num_frames", 1))
        if len(documents) >= cfg.evaluate.questions:
            break
    documents = documents[: cfg.evaluate.questions]
    folder = data_dir() / "questions" / hashlib.sha256(repr(documents).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "questions.parquet").is_file():
        with atomic_write(folder / "questions.parquet") as scratch:
            datasets.Dataset.from_list(documents, features=FEATURES).to_parquet(scratch)
    write_json(folder / f"{TASK}.yaml", _task(cfg, folder, documents))  # JSON is YAML
    return folder
