"""From rows to token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.conversations import Row
from vzip.media import MEDIA_INPUTS
from vzip.templates import IGNORED, IMAGE, VIDEO, Template, encode


@dataclass(frozen=True)
class Example:
    """A tokenized row: one placeholder id an image or video, not yet expanded."""

    ids: list[int]
    labels: list[int]
    media: dict[str, tuple[Path, ...]]
    """Its images and its videos, by kind; a kind that it has not is left out."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels of each of its images, upright; empty where they are not known."""

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def example_of(ids: list[int], labels: list[int], row: Row, tokenizer: Any, folder: Path) -> Example:
    """The example with as many of the row's images and videos as `ids` has placeholders."""
    media = {}
    for kind, token, paths in (("image", IMAGE, row.images), ("video", VIDEO, row.videos)):
        if paths and (count := ids.count(tokenizer.convert_tokens_to_ids(token))):
            media[kind] = tuple(folder / path for path in paths[:count])
    return Example(ids, labels, media)


def tokenize(
    rows: Sequence[Row], template: Template, tokenizer: Any, folder: Path, *, max_tokens: int
) -> tuple[list[Example], int]:
    """The rows' ids and labels, and how many rows were cut at `max_tokens` text tokens (as LLaVA cuts them)."""
    examples, num_cut = [], 0
    for row in rows:
        ids, labels = encode(template, tokenizer, row.turns)
        num_cut += len(ids) > max_tokens
        examples.append(example_of(ids[:max_tokens], labels[:max_tokens], row, tokenizer, folder))
    return examples, num_cut


def kinds_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Kinds of media that the rows hold, images first; images where they hold none."""
    found = {kind for example in examples for kind in example.media}
    return tuple(kind for kind in MEDIA_INPUTS if kind in found) or ("image",)
