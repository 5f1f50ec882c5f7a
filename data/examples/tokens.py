"""From rows to token ids and labels, made once into memory-mapped arrays."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.conversations import Conversation
from data.examples.arrow import read_arrow, write_arrow
from vzip import UserError
from vzip.media import MEDIA_INPUTS
from vzip.templates.encode import IGNORED, IMAGE, VIDEO, Template, encode

VERSION = 1
"""Of what is written: raise it when this file, or `run_vision_tower`, makes something else of the same rows."""
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "images": pa.list_(pa.string()),
        "videos": pa.list_(pa.string()),
        "sizes": pa.list_(pa.int32()),  # height and width of each image, one after the other
        "num_images": pa.int32(),
        "num_videos": pa.int32(),
        "num_tokens": pa.int32(),
        "num_labels": pa.int32(),
        "num_whole_tokens": pa.int32(),  # before the row was cut
        "num_whole_labels": pa.int32(),
    }
)


@dataclass(frozen=True)
class Example:
    """A tokenized row: one placeholder id an image or video, not yet expanded."""

    ids: list[int]
    labels: list[int]
    media: dict[str, tuple[Path, ...]]
    """Its images and its videos, by kind; a kind that it has not is left out."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels of each of its images, upright; empty where they are not known."""
    index: int = -1
    """Its number in the subset; -1 where it belongs to none."""

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def example_of(ids: list[int], labels: list[int], row: Conversation, tokenizer: Any, folder: Path) -> Example:
    """The example with as many of the row's images and videos as `ids` has placeholders."""
    media = {}
    for kind, token, paths in (("image", IMAGE, row.images), ("video", VIDEO, row.videos)):
        if paths and (count := ids.count(tokenizer.convert_tokens_to_ids(token))):
            media[kind] = tuple(folder / path for path in paths[:count])
    return Example(ids, labels, media)


def kinds_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Kinds of media that the rows hold, images first; images where they hold none."""
    found = {kind for example in examples for kind in example.media}
    return tuple(kind for kind in MEDIA_INPUTS if kind in found) or ("image",)


class Examples(Sequence[Example]):
    """Tokenized rows, memory-mapped: opened at once, and one copy for all ranks and workers of a machine.

    Rows that the cut left without a label are not among them.

    Args:
        path: of the file that `tokenized` wrote.
        folder: of the images and videos.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder

    def __getstate__(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "folder": self.folder,
        }  # workers that are not forked map the file themselves

    @cached_property
    def table(self) -> pa.Table:
        """All rows, also those without a label, see `SCHEMA`."""
        return read_arrow(self.path)

    def column(self, name: str) -> np.ndarray:
        """int32[rows]: a column of numbers, of the rows that are examples."""
        values: np.ndarray = self.table[name].to_numpy()
        return values[self._positions]

    @cached_property
    def _positions(self) -> np.ndarray:
        return np.flatnonzero(self.table["num_labels"].to_numpy())

    def flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids and labels of all rows, one behind the other, and where each example begins and ends among them."""
        ids, labels = (self.table[name].combine_chunks() for name in ("ids", "labels"))
        starts = ids.offsets.to_numpy().astype(np.int64)
        values = (column.values.to_numpy() for column in (ids, labels))
        return *values, starts[self._positions], starts[self._positions + 1]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media that the rows hold, images first; images where they hold none."""
        found = [kind for kind in MEDIA_INPUTS if (self.column(f"num_{kind}s") > 0).any()]
        return tuple(found) or ("image",)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Example:
        position = int(self._positions[index])
        row = {
            name: self.table[name][position].values for name in ("ids", "labels", "images", "videos", "sizes")
        }
        media = {"image": row["images"].to_pylist(), "video": row["videos"].to_pylist()}
        return Example(
            ids=row["ids"].to_numpy().tolist(),
            labels=row["labels"].to_numpy().tolist(),
            media={
                kind: tuple(self.folder / path for path in paths) for kind, paths in media.items() if paths
            },
            sizes=tuple(map(tuple, row["sizes"].to_numpy().reshape(-1, 2).tolist())),
            index=int(index),
        )


def _record(
    row: Conversation,
    ids: list[int],
    labels: list[int],
    *,
    tokenizer: Any,
    max_tokens: int,
    sizes: Mapping[str, Any],
) -> dict[str, Any]:
    """A row of the file: the row cut at `max_tokens` text tokens, as LLaVA cuts it."""
    example = example_of(ids[:max_tokens], labels[:max_tokens], row, tokenizer, Path())
    images, videos = ([str(path) for path in example.media.get(kind, ())] for kind in ("image", "video"))
    return {
        "id": row.id,
        "source": row.source,
        "ids": example.ids,
        "labels": example.labels,
        "images": images,
        "videos": videos,
        "sizes": [side for path in images for side in sizes[path]],
        "num_images": len(images),
        "num_videos": len(videos),
        "num_tokens": len(example.ids),
        "num_labels": example.num_labels,
        "num_whole_tokens": len(ids),
        "num_whole_labels": sum(label != IGNORED for label in labels),
    }


def _fingerprint(tokenizer: Any) -> str:
    """sha256 of everything that a tokenizer saves of itself."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def tokens_key(template: Template, tokenizer: Any, *, max_tokens: int, digest: str) -> str:
    """What the arrays depend on, as a short hash: `digest` is that of the rows."""
    what = [VERSION, repr(template), _fingerprint(tokenizer), max_tokens, digest]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def write_tokens(
    rows: Iterable[Conversation],
    template: Template,
    tokenizer: Any,
    target: Path,
    *,
    max_tokens: int,
    sizes: Mapping[str, Any],
) -> None:
    """Write the rows' ids and labels to `target`, beside its place first.

    Args:
        rows: in the order of the examples.
        template: the model's training format.
        tokenizer: the model's.
        target: the file.
        max_tokens: text tokens at which a row is cut.
        sizes: (height, width) of every image, by its path in the rows.

    Raises:
        UserError: a row that the template or the tokenizer does not take, by its id.
    """

    def record(row: Conversation) -> dict[str, Any]:
        try:
            ids, labels = encode(template, tokenizer, row.turns)
        except UserError as error:
            raise UserError(f"row {row.id}: {error}") from error
        if unknown := [path for path in row.images if path not in sizes]:
            raise UserError(
                f"row {row.id}: nothing is recorded of {unknown[0]}; run `make data` again, which looks at it"
            )
        return _record(row, ids, labels, tokenizer=tokenizer, max_tokens=max_tokens, sizes=sizes)

    write_arrow(map(record, rows), SCHEMA, target)
