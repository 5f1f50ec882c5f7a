"""Rows in LLaVA's form: `{"id", "image", "video", "conversations": [{"from", "value"}, ...]}`.

Source of the format: repository haotian-liu/LLaVA, `docs/Finetune_Custom_Data.md`; with videos, repository
PKU-YuanGroup/Video-LLaVA, `videollava/train/train.py` (`LazySupervisedDataset`).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vzip.templates.encode import IMAGE, VIDEO


@dataclass(frozen=True)
class Conversation:
    """One conversation."""

    id: str
    images: tuple[str, ...]
    """Paths below the image folder, one for each `<image>` in the questions."""
    videos: tuple[str, ...]
    """Paths below the same folder, of files or of folders of frames, one for each `<video>` in the questions."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer) pairs."""
    source: str
    """Where the row comes from: its "source", else the first folder of its first path, "files" (in no folder), or "text"."""
    kind: str
    """The question type, for held-out questions: its "type", else "all"."""
    digest: str
    """sha256 of the row's content: the same everywhere, whatever the order of its keys."""

    @property
    def media(self) -> dict[str, tuple[str, ...]]:
        """The paths by kind."""
        return {"image": self.images, "video": self.videos}


@dataclass(frozen=True)
class BadExample:
    """A row that can't be used, and why."""

    id: str
    source: str
    reason: str


def canonical(row: Any) -> bytes:
    """A row's content as bytes, the same whatever the order of its keys. Raises ValueError for half a surrogate pair."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False).encode()


def _speaker(message: Any) -> Any:
    return message.get("from") if isinstance(message, dict) else None


def _turns(conversation: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(conversation, list) and conversation and _speaker(conversation[0]) == "gpt":
        conversation = conversation[
            1:
        ]  # ShareGPT's pieces of long talks start with an answer, which LLaVA skips too
    if not isinstance(conversation, list) or not conversation or len(conversation) % 2:
        raise ValueError("conversations is not a list of question-answer pairs")
    texts = []
    for position, message in enumerate(conversation):
        speaker = ("human", "gpt")[position % 2]
        if _speaker(message) != speaker:
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
    return tuple(str(PurePosixPath(path)) for path in paths)  # "./a.jpg" is "a.jpg"


def _source(paths: tuple[str, ...]) -> str:
    """The folder that the first path is in; "files" for one that is in none, "text" without paths."""
    if not paths:
        return "text"
    folder, *below = PurePosixPath(paths[0]).parts
    return folder if below else "files"


def parse_conversation(row: Any) -> Conversation:
    """The row of one JSON object. Raises ValueError with the reason if it has not LLaVA's form."""
    if not isinstance(row, dict):
        raise ValueError("the row is not an object")
    turns = _turns(row.get("conversations"))
    images = _paths(row, "image", sum(question.count(IMAGE) for question, _ in turns))
    videos = _paths(row, "video", sum(question.count(VIDEO) for question, _ in turns))
    return Conversation(
        id=str(row.get("id", "")),
        images=images,
        videos=videos,
        turns=turns,
        source=str(row.get("source") or _source(images + videos)),
        kind=str(row.get("type", "all")),
        digest=hashlib.sha256(canonical(row)).hexdigest(),
    )
