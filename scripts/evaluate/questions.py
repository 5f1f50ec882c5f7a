"""Write held-out questions, with their pictures, as a file that lmms-eval's task reads."""

import hashlib
import io
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
from omegaconf import DictConfig

from data.paths import data_dir
from scripts.evaluate.tasks import HELD_OUT
from train import config
from train.evaluation.questions import HeldOutQuestion, held_out_questions
from train.examples import held_out_conversations
from train.runs import FinishedRun
from vzip import UserError
from vzip.files import atomic_write, check_is_file, write_json
from vzip.videos import read_frames

TEMPLATE = Path(__file__).parent / "held_out_task" / "held_out.yaml"
FEATURES = datasets.Features(
    {
        # The media of the question, and before them those of the previous turns, which the model
        # sees too. A video is a list of its frames.
        "images": datasets.List(datasets.Image()),
        "videos": datasets.List(datasets.List(datasets.Image())),
        # The turns before the question, as JSON: [[question, true answer], ...].
        "turns": datasets.Value("string"),
        # The question, with its placeholders.
        "question": datasets.Value("string"),
        # The true answer.
        "answer": datasets.Value("string"),
        # The type of question that scores are grouped by.
        "kind": datasets.Value("string"),
    }
)
"""Fields of a question."""


def _question_settings(run: Path | None) -> DictConfig:
    """Return the settings of a run that has held-out questions, or those of the embedded default.

    Raises:
        UserError: the file of the questions does not exist.
    """
    config.register()
    finished = None if run is None else FinishedRun(run)

    # Prefer the run's own questions, because their scores can be compared with those after tuning.
    if finished is not None and finished.has_settings and config.asks_questions(finished.settings):
        cfg = finished.settings
        advice = "put the file there again"
    else:
        cfg = config.compose_settings()
        advice = "`make data`, without MODEL, makes it"

    if not Path(cfg.data.held_out).expanduser().exists():
        raise UserError(f"the held-out questions, {cfg.data.held_out}, do not exist; {advice}")
    return cfg


def _encoded(frame: Any) -> dict[str, Any]:
    """Encode a frame of a video in the form that `datasets.Image` stores."""
    # PNG loses nothing, so the model sees the same pixels as after tuning.
    buffer = io.BytesIO()
    frame.save(buffer, format="png")
    return {"bytes": buffer.getvalue(), "path": None}


def _document(question: HeldOutQuestion, folder: Path, *, num_frames: int) -> dict[str, Any]:
    """Return a question with the fields of `FEATURES`.

    Args:
        question: the question.
        folder: folder of its pictures and videos.
        num_frames: frames that the model takes of a video.
    """
    # Without a path, `datasets` stores the bytes, and the file does not depend on this machine.
    images = []
    for path in question.images:
        try:
            check_is_file(folder / path)
            content = (folder / path).read_bytes()
        except (OSError, ValueError) as error:
            raise UserError(f"a held-out picture, {folder / path}, can't be read: {error}") from error
        images.append({"bytes": content, "path": None})

    videos = []
    for path in question.videos:
        frames = read_frames(folder / path, num_frames)
        videos.append([_encoded(frame) for frame in frames])

    return {
        "images": images,
        "videos": videos,
        "turns": json.dumps(question.previous_turns),
        "question": question.text,
        "answer": question.expected,
        "kind": question.kind,
    }


def _task(cfg: DictConfig, folder: Path, documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of the task that depends on the questions. It includes held_out.yaml."""
    # One score for each kind of question, and "all" for all of them together.
    kinds = sorted({document["kind"] for document in documents} - {"all"})

    metrics = []
    for kind in [*kinds, "all"]:
        metrics.append({"metric": kind, "aggregation": "mean", "higher_is_better": True})

    return {
        "task": HELD_OUT,
        "include": str(TEMPLATE),
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.parquet")}},
        "metric_list": metrics,
        "generation_kwargs": {
            "max_new_tokens": cfg.evaluate.max_new_tokens,
            "until": [],
            "do_sample": False,
        },
    }


def write_questions(run: Path | None) -> Path:
    """Write the held-out questions of a run, or those of the embedded default if the run has none.

    Args:
        run: folder of the run. None for the embedded default.

    Returns:
        Folder for lmms-eval's `--include_path`, with the task and questions.parquet. Its name is
        a hash of the questions.

    Raises:
        UserError: the file of the questions, or one of their pictures, can't be read.
    """
    # Take the same questions, with the same limit, as the evaluation after tuning.
    with nullcontext() if run is None else FinishedRun(run).explained():
        cfg = _question_settings(run)
        media_folder = Path(cfg.data.image_folder).expanduser()
        num_frames = cfg.model.get("num_frames", 1)
        questions = held_out_questions(held_out_conversations(cfg), limit=cfg.evaluate.questions)
    documents = [_document(question, media_folder, num_frames=num_frames) for question in questions]

    # Equal questions share one folder, whichever run they come from. Their answers carry its name,
    # so they are found again.
    name = hashlib.sha256(repr(documents).encode()).hexdigest()[:16]
    folder = data_dir() / "questions" / name
    folder.mkdir(parents=True, exist_ok=True)

    # The name says that the content is the same, so an existing file is never written again.
    if not (folder / "questions.parquet").is_file():
        with atomic_write(folder / "questions.parquet") as scratch:
            datasets.Dataset.from_list(documents, features=FEATURES).to_parquet(scratch)

    # lmms-eval reads YAML, and every JSON file is YAML too.
    write_json(folder / f"{HELD_OUT}.yaml", _task(cfg, folder, documents))
    return folder
