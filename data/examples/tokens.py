"""Training examples as token ids and labels, in the columns of an Arrow file."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from data.conversations import Conversation
from data.examples.arrow import read_arrow, write_arrow
from vzip import UserError
from vzip.media import KINDS
from vzip.templates.encode import IGNORED, Template, encode

VERSION = 2
"""Version of the written columns.

Raise it when a change of this file or of `encode` changes what is written.
"""

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
        "num_whole_tokens": pa.int32(),  # before the conversation was cut
        "num_whole_labels": pa.int32(),
    }
)
"""Columns of the file. It has one record for each conversation of the subset."""


@dataclass(frozen=True)
class Example:
    """A tokenized conversation, in which each image or video is still one placeholder id."""

    ids: list[int]
    labels: list[int]
    media: dict[str, tuple[Path, ...]]
    """Paths of its images and videos by kind. A kind without paths has no entry."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels of each image, upright. Empty if they are not known."""
    index: int = -1
    """Its number among the examples of the subset. -1 if it belongs to no subset."""

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def example_of(
    ids: list[int],
    labels: list[int],
    conversation: Conversation,
    template: Template,
    tokenizer: Any,
    folder: Path,
) -> Example:
    """Build an example with as many images and videos as `ids` has placeholders."""
    media = {}
    for kind in KINDS:
        # Look up the placeholder of videos only if there are any: some tokenizers have none.
        paths = conversation.media[kind]
        if not paths:
            continue

        # A cut removes placeholders from the end, so the first paths belong to those that are left.
        num_placeholders = ids.count(tokenizer.convert_tokens_to_ids(template.placeholder(kind)))
        if num_placeholders:
            media[kind] = tuple(folder / path for path in paths[:num_placeholders])

    return Example(ids, labels, media)


def _ordered_kinds(present: set[str]) -> tuple[str, ...]:
    """Return the kinds of media that are present, images first. Text alone counts as images."""
    return tuple(kind for kind in KINDS if kind in present) or ("image",)


def kinds_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """Return the kinds of media that some examples have, images first. At least images."""
    present: set[str] = set()
    for example in examples:
        present.update(example.media)

    return _ordered_kinds(present)


class FlatTokens(NamedTuple):
    """Token ids and labels of many examples in two long arrays, one example behind the other."""

    ids: np.ndarray
    """int32[tokens]."""
    labels: np.ndarray
    """int32[tokens]."""
    starts: np.ndarray
    """int64[examples]: where each example begins."""
    stops: np.ndarray
    """int64[examples]: where each example ends. Tokens between two examples belong to none."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[list[int], list[int]]]) -> Self:
        """Join the (ids, labels) of some examples."""
        # Each example ends where the next one starts.
        all_ids: list[int] = []
        all_labels: list[int] = []
        stops: list[int] = []
        for ids, labels in pairs:
            all_ids += ids
            all_labels += labels
            stops.append(len(all_ids))
        return cls(np.array(all_ids), np.array(all_labels), np.array([0, *stops[:-1]]), np.array(stops))

    @property
    def lengths(self) -> np.ndarray:
        """int64[examples]: tokens of each example."""
        lengths: np.ndarray = self.stops - self.starts
        return lengths

    def first(self, matches: np.ndarray) -> np.ndarray:
        """Find the first matching token of each example.

        Args:
            matches: bool[tokens].

        Returns:
            int64[examples]: its position in the example, or the example's length if none matches.
        """
        # A match behind all tokens stands for "no match", and becomes the example's end.
        positions = np.append(np.flatnonzero(matches), len(matches))
        at_or_after_start = positions[np.searchsorted(positions, self.starts)]
        first: np.ndarray = np.minimum(at_or_after_start, self.stops) - self.starts
        return first

    def last(self, matches: np.ndarray) -> np.ndarray:
        """Find the last matching token of each example.

        Args:
            matches: bool[tokens].

        Returns:
            int64[examples]: its position in the example, or a number below zero if none matches.
        """
        # A match before all tokens, or in an earlier example, stands for "no match".
        positions = np.append(-1, np.flatnonzero(matches))
        before_stop = positions[np.searchsorted(positions, self.stops) - 1]
        last: np.ndarray = before_stop - self.starts
        return last


class Examples(Sequence[Example]):
    """Tokenized conversations in columns.

    The file is mapped, so that all ranks and workers of a machine share one copy.

    A conversation without a label, because of the cut or of its template, is not an example: its
    record in `table` is skipped here.

    Args:
        table: the columns of `SCHEMA`.
        folder: the folder that the paths of images and videos are relative to.
        path: the file that `table` is mapped from. None for a table in memory.
    """

    def __init__(self, table: pa.Table, folder: Path, *, path: Path | None = None) -> None:
        self.table = table
        self.folder = folder
        self.path = path

    @classmethod
    def open(cls, path: Path, folder: Path) -> Self:
        """Map a file from `write_tokens`. Raises UserError if it is damaged."""
        return cls(read_arrow(path), folder, path=path)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Self:
        """Keep examples in memory, without a file. Those without a label are dropped."""
        records = [record_of(example, whole_labels=example.labels) for example in examples]
        return cls(pa.Table.from_pylist(records, SCHEMA), folder=Path())

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is not forked maps the file itself: a copy would take its memory again.
        if self.path is not None:
            return Examples.open, (self.path, self.folder)
        return Examples, (self.table, self.folder)

    @cached_property
    def _rows(self) -> np.ndarray:
        """int64[examples]: row of each example in the table."""
        return np.flatnonzero(self.table["num_labels"].to_numpy())

    def column(self, name: str) -> np.ndarray:
        """Return a column: int32[examples] for numbers, an array of arrays for lists."""
        values: np.ndarray = self.table[name].to_numpy()
        return values[self._rows]

    def flat_tokens(self) -> FlatTokens:
        """Return token ids and labels of all examples."""
        # The file is written in chunks, and the offsets of each chunk begin at 0.
        ids = self.table["ids"].combine_chunks()
        labels = self.table["labels"].combine_chunks()

        # There is an offset for each record. Only those of examples are used.
        offsets = ids.offsets.to_numpy().astype(np.int64)
        return FlatTokens(
            ids.values.to_numpy(),
            labels.values.to_numpy(),
            starts=offsets[self._rows],
            stops=offsets[self._rows + 1],
        )

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media that the examples have, images first. At least images."""
        # Counted in columns, as `kinds_of` would build every example.
        present = set()
        for kind in KINDS:
            if self.column(f"num_{kind}s").any():
                present.add(kind)
        return _ordered_kinds(present)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Example:
        # The table also has records that are no examples, so the numbers differ.
        row = int(self._rows[index])

        media = {}
        for kind in KINDS:
            paths = self.table[f"{kind}s"][row].as_py()
            if paths:
                media[kind] = tuple(self.folder / path for path in paths)

        return Example(
            ids=self.table["ids"][row].values.to_numpy().tolist(),
            labels=self.table["labels"][row].values.to_numpy().tolist(),
            media=media,
            sizes=pairs_of_sides(self.table["sizes"][row].values.to_numpy()),
            index=int(index),
        )


def pairs_of_sides(sides: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of each image, from an entry of the column "sizes"."""
    return tuple((height, width) for height, width in sides.reshape(-1, 2).tolist())


def record_of(
    example: Example, *, name: str = "", source: str = "", whole_labels: Sequence[int]
) -> dict[str, Any]:
    """Build one record of the table.

    Args:
        example: the example, after the cut.
        name: the conversation's id.
        source: the conversation's source.
        whole_labels: its labels before the cut.
    """
    images = [str(path) for path in example.media.get("image", ())]
    videos = [str(path) for path in example.media.get("video", ())]
    return {
        "id": name,
        "source": source,
        "ids": example.ids,
        "labels": example.labels,
        "images": images,
        "videos": videos,
        "sizes": [side for size in example.sizes for side in size],
        "num_images": len(images),
        "num_videos": len(videos),
        "num_tokens": len(example.ids),
        "num_labels": example.num_labels,
        "num_whole_tokens": len(whole_labels),
        "num_whole_labels": sum(label != IGNORED for label in whole_labels),
    }


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash all files that the tokenizer saves."""
    # The files hold vocabulary, merges and special tokens, whatever the tokenizer's class is.
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def tokens_key(template: Template, tokenizer: Any, *, max_tokens: int, digest: str) -> str:
    """Hash everything that the token ids depend on. `digest` is the hash of the conversations."""
    dependencies = [VERSION, repr(template), _tokenizer_fingerprint(tokenizer), max_tokens, digest]
    return hashlib.sha256(json.dumps(dependencies).encode()).hexdigest()[:12]


def write_tokens(
    conversations: Iterable[Conversation],
    template: Template,
    tokenizer: Any,
    target: Path,
    *,
    max_tokens: int,
    sizes: Mapping[str, Any],
) -> None:
    """Tokenize conversations and write them to `target`, whole or not at all.

    Args:
        conversations: the conversations, in the order of the examples.
        template: the model's training format.
        tokenizer: the model's tokenizer.
        target: the file to write.
        max_tokens: number of text tokens at which a conversation is cut. LLaVA then cuts it again
            with its visual tokens; here all budgets train the same labels.
        sizes: (height, width) of every image, by its path in the conversations.

    Raises:
        UserError: the template or the tokenizer refuses a conversation. The message has its id.
    """

    def records() -> Iterator[dict[str, Any]]:
        for conversation in conversations:
            # Encode the whole conversation first, to record how much the cut removes.
            ids, labels = _encode(conversation, template, tokenizer)
            cut = example_of(ids[:max_tokens], labels[:max_tokens], conversation, template, tokenizer, Path())
            example = replace(cut, sizes=_sizes_of(conversation, cut, sizes))
            yield record_of(
                example,
                name=conversation.id,
                source=conversation.source,
                whole_labels=labels,
            )

    write_arrow(records(), SCHEMA, target)


def _encode(conversation: Conversation, template: Template, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Encode a whole conversation. Raises UserError, with its id, if that fails."""
    try:
        return encode(template, tokenizer, conversation.turns)
    except UserError as error:
        raise UserError(f"example {conversation.id}: {error}") from error


def _sizes_of(
    conversation: Conversation, example: Example, sizes: Mapping[str, Any]
) -> tuple[tuple[int, int], ...]:
    """Look up the sizes of the example's images. Raises UserError if one was never looked at."""
    # Check the images that the cut removes too, so that the error does not depend on the cut.
    for path in conversation.images:
        if path not in sizes:
            raise UserError(
                f"example {conversation.id}: nothing is recorded about {path}; "
                f"run `make data` again, which looks at it"
            )

    return tuple(tuple(sizes[str(path)]) for path in example.media.get("image", ()))
