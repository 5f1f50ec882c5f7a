"""Read LLaVA's conversation JSON: a list of `{"id", "image", "video", "conversations": [{"from", "value"}, ...]}`.

A row that is not of that form is listed with its reason and left out; a file that is not JSON ends the command.
Source of the format: repository haotian-liu/LLaVA, `docs/Finetune_Custom_Data.md`; with videos, repository
PKU-YuanGroup/Video-LLaVA, `videollava/train/train.py` (`LazySupervisedDataset`).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vzip import UserError
from vzip.templates import IMAGE, VIDEO


@dataclass(frozen=True)
class Row:
    """One conversation."""

    id: str
    images: tuple[str, ...]
    """Paths below the image folder, one for each `<image>` in the questions."""
    videos: tuple[str, ...]
    """Paths below the same folder, of files or of folders of frames, one for each `<video>` in the questions."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs."""
    source: str
    """Where the row comes from: its "source", else the first part of the first image's or video's path, or "text"."""
    kind: str
    """The question type, for held-out questions: its "type", else "all"."""
    digest: str
    """sha256 of the row's content: the same everywhere, whatever the order of its keys."""


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used, and why."""

    id: str
    source: str
    reason: str


def _turns(conversation: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(conversation, list) or not conversation or len(conversation) % 2:
        raise ValueError("conversations is not a list of question-answer pairs")
    texts = []
    for position, message in enumerate(conversation):
        speaker = ("human", "gpt")[position % 2]
        if not isinstance(message, dict) or message.get("from") != speaker:
            raise ValueError(f"message {position} is not from {speaker!r}; human and gpt must alternate")
        if not isinstance(message.get("value"), str):
            raise ValueError(f"message {position} has no text in 'value'")
        texts.append(message["value"])
    for placeholder in (IMAGE, VIDEO):
        if any(placeholder in answer for answer in texts[1::2]):
            raise ValueError(f"an answer contains {placeholder}")
    if not all(answer.strip() for answer in texts[1::2]):
        raise ValueError("an answer is empty")
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _paths(row: dict[str, Any], key: str, num_placeholders: int) -> tuple[str, ...]:
    """The row's "image" or "video" paths, as many as `<image>` or `<video>` in the questions."""
    entry = row.get(key)
    paths = [] if entry is None else [entry] if isinstance(entry, str) else entry
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{key} is neither a path nor a list of paths")
    if not all(Path(path).name for path in paths):
        raise ValueError(f"a path of {key} names no file")
    if any(Path(path).is_absolute() or ".." in Path(path).parts for path in paths):
        raise ValueError(f"a path of {key} leaves the image folder")
    if len(paths) != num_placeholders:
        raise ValueError(f"{num_placeholders} <{key}> in the questions, but {len(paths)} {key}s")
    return tuple(paths)


def parse_row(row: Any) -> Row:
    """The row of one JSON object. Raises ValueError with the reason if it has not LLaVA's form."""
    if not isinstance(row, dict):
        raise ValueError("the row is not an object")
    turns = _turns(row.get("conversations"))
    images = _paths(row, "image", sum(question.count(IMAGE) for question, _ in turns))
    videos = _paths(row, "video", sum(question.count(VIDEO) for question, _ in turns))
    content = json.dumps(row, sort_keys=True, ensure_ascii=False).encode()  # half a surrogate pair is a ValueError here
    return Row(
        id=str(row.get("id", "")),
        images=images,
        videos=videos,
        turns=turns,
        source=str(row.get("source") or (Path((images + videos)[0]).parts[0] if images or videos else "text")),
        kind=str(row.get("type", "all")),
        digest=hashlib.sha256(content).hexdigest(),
    )


def read_rows(path: str | Path) -> tuple[list[Row], list[BadRow]]:
    """The rows of a JSON file, and those that can't be used.

    Raises:
        UserError: a file that is missing, is not JSON (with line and column), or holds no list.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; set data.path (or data.held_out) to a LLaVA-format JSON file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}") from error
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of rows, found {type(content).__name__}")
    rows, bad = [], []
    for position, entry in enumerate(content):
        try:
            rows.append(parse_row(entry))
        except ValueError as error:
            name = str(entry.get("id", f"#{position}")) if isinstance(entry, dict) else f"#{position}"
            bad.append(BadRow(id=name, source="rows", reason=str(error)))
    return rows, bad
