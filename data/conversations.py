"""Parse training examples in LLaVA's form.

An example is `{"id", "image", "video", "conversations": [{"from", "value"}, ...]}`.
Source of the format: repository haotian-liu/LLaVA, `docs/Finetune_Custom_Data.md`; with videos,
repository PKU-YuanGroup/Video-LLaVA, `videollava/train/train.py` (`LazySupervisedDataset`).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vzip.templates.encode import IMAGE, VIDEO

SPEAKERS = ("human", "gpt")  # in turn

MAX_TEXT = 1_000_000
"""Most characters of a conversation. It is tokenized whole, which takes seconds for so many."""
MAX_MESSAGES = 10_000
"""Most messages of a conversation. Each is tokenized by itself, however short it is."""
MAX_PATH = 1000
"""Most characters of a path. Many systems open no longer ones."""
MAX_NAME = 200
"""Longer ids, sources and types are cut: messages and tables print them."""


@dataclass(frozen=True)
class Conversation:
    """One training example: questions and answers about images and videos.

    Attributes:
        id: a name for messages, which need not be unique.
        images: paths below the image folder, one for each `<image>` in the turns.
        videos: paths below the same folder, of files or of folders of frames, one for each
            `<video>` in the turns.
        turns: (question, answer) pairs.
        source: where the example comes from: its "source", else the first folder of its first path,
            "files" if that path has no folder, or "text" without paths.
        kind: the question type, for held-out questions: its "type", else "all".
        digest: sha256 of the example's content, the same whatever the order of its keys.
    """

    id: str
    images: tuple[str, ...]
    videos: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    source: str
    kind: str
    digest: str

    @property
    def media(self) -> dict[str, tuple[str, ...]]:
        """The paths by kind."""
        return {"image": self.images, "video": self.videos}


@dataclass(frozen=True)
class BadExample:
    """An example that can't be used, and why."""

    id: str
    source: str
    reason: str


def _speaker(message: Any) -> Any:
    # A message of another type has no speaker, so the checks below report it with its position.
    return message.get("from") if isinstance(message, dict) else None


def _texts(messages: Any) -> list[str]:
    """Return the texts of messages in which human and gpt alternate.

    Raises ValueError if they do not alternate.
    """
    # ShareGPT cuts long talks into pieces, which may start with an answer. LLaVA skips it too.
    if isinstance(messages, list) and messages and _speaker(messages[0]) == "gpt":
        messages = messages[1:]

    # An odd number of messages leaves a question without an answer. LLaVA's trainer puts no loss on
    # such a conversation.
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise ValueError("conversations is not a list of question-answer pairs")

    texts = []
    for position, message in enumerate(messages):
        speaker = SPEAKERS[position % 2]
        if _speaker(message) != speaker:
            raise ValueError(f"message {position} is not from {speaker!r}; human and gpt must alternate")
        if not isinstance(message.get("value"), str):
            raise ValueError(f"message {position} has no text in 'value'")
        texts.append(message["value"])

    if len(texts) > MAX_MESSAGES:
        raise ValueError(f"it has {len(texts):,} messages; at most {MAX_MESSAGES:,} are allowed")
    num_characters = sum(map(len, texts))
    if num_characters > MAX_TEXT:
        raise ValueError(f"the texts have {num_characters:,} characters; at most {MAX_TEXT:,} are allowed")
    return texts


def _one_placeholder(texts: list[str], images: Any) -> list[str]:
    """Keep one `<image>` of each text if that leaves one for each picture, as LLaVA's code does.

    It has one picture for an example, and a text that names it twice still shows it once.
    """
    num_images = len(images) if isinstance(images, list) else 1
    num_texts = sum(IMAGE in text for text in texts)
    if images is None or num_texts != num_images:
        return texts

    single = []
    for text in texts:
        before, placeholder, after = text.partition(IMAGE)
        single.append(before + placeholder + after.replace(IMAGE, ""))
    return single


def _paths(entry: dict[str, Any], key: str, num_placeholders: int) -> tuple[str, ...]:
    """Return the example's "image" or "video" paths.

    Raises ValueError unless there is one for each placeholder.
    """
    # A path, a list of paths, or nothing: all become a list.
    paths = entry.get(key)
    if paths is None:
        paths = []
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{key} is neither a path nor a list of paths")

    # Such a path can't be opened, and would fill the screen in messages.
    longest = max(map(len, paths), default=0)
    if longest > MAX_PATH:
        raise ValueError(f"a path of {key} has {longest:,} characters; at most {MAX_PATH:,} are allowed")

    # Data may come from anywhere, so its paths must not read or write outside the image folder.
    for path in map(Path, paths):
        if not path.name:
            raise ValueError(f"a path of {key} names no file")
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"a path of {key} leaves the image folder")

    # The model puts each image or video where its placeholder is, so neither may be left over.
    # LLaVA's code takes some such examples for text, and some with another example's picture.
    if len(paths) != num_placeholders:
        raise ValueError(f"{num_placeholders} <{key}> in the conversation, but {len(paths)} {key}s")
    return tuple(str(PurePosixPath(path)) for path in paths)  # "./a.jpg" is "a.jpg"


def _source(paths: tuple[str, ...]) -> str:
    """Return the first folder of the first path, "files" without folder, "text" without paths."""
    if not paths:
        return "text"
    folder, *below = PurePosixPath(paths[0]).parts
    return folder if below else "files"


def short_name(value: Any) -> str:
    """Return an id, a source or a type as text that messages can print."""
    name = str(value)
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."


def _digest(entry: dict[str, Any]) -> str:
    # Sorted keys: an example has the same hash in whatever order its keys are written.
    # `encode` raises ValueError for half a surrogate pair, which no tokenizer takes.
    content = json.dumps(entry, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(content).hexdigest()


def parse_conversation(entry: Any) -> Conversation:
    """Parse the example that a JSON object holds.

    Raises ValueError, with the reason, if it is not in LLaVA's form.
    """
    if not isinstance(entry, dict):
        raise ValueError("the example is not an object")

    # Paths belong to the whole example, so placeholders are counted in all texts together. An answer
    # may have some too: LLaVA's code shows the picture there, and puts no loss on it.
    texts = _one_placeholder(_texts(entry.get("conversations")), entry.get("image"))
    everything = "\n".join(texts)
    images = _paths(entry, "image", everything.count(IMAGE))
    videos = _paths(entry, "video", everything.count(VIDEO))
    return Conversation(
        id=short_name(entry.get("id", "")),
        images=images,
        videos=videos,
        turns=tuple(zip(texts[::2], texts[1::2], strict=True)),
        source=short_name(entry.get("source") or _source(images + videos)),
        kind=short_name(entry.get("type", "all")),
        digest=_digest(entry),
    )
