"""From rows to micro batches: padded, or packed one behind the other.

Legend of shapes: M rows of a micro batch, L the longest row's tokens; T tokens of packed rows, n of them followed by a label.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from data.batches.media import Media, Processed
from data.batches.packing import num_tail_tokens
from data.examples.tokens import Example, Examples
from vzip import UserError
from vzip.families import Family
from vzip.reducers import Reducer
from vzip.templates.encode import IGNORED

Ids = tuple[list[int], list[int]]
"""Token ids and labels of a row."""
MediaInputs = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes."""

    input_ids: Tensor
    """int64[M, L], padded on the right; packed, int64[T]."""
    media: MediaInputs
    """Of all the rows' images and videos, by kind, images first, what `vzip.media.normalised` makes the model's inputs of:
    pixels are uint8 until they are on the device. A blank image or video where no row has any."""
    num_placeholders: dict[str, int]
    """Placeholders in `input_ids` by kind; 0 where the kind is blank."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with each tensor changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: changed(inner) for name, inner in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, **{field.name: changed(getattr(self, field.name)) for field in fields(self)})

    def pin_memory(self) -> Self:
        """Asked for by torch's DataLoader: a GPU copies from such memory while it computes."""
        return self.each(Tensor.pin_memory)


@dataclass(frozen=True)
class PaddedBatch(MicroBatch):
    """Rows of one length."""

    attention_mask: Tensor
    """int64[M, L]."""
    labels: Tensor
    """int64[M, L], `IGNORED` where there is no loss."""


@dataclass(frozen=True)
class PackedBatch(MicroBatch):
    """Rows one behind the other, without the prefix that all of them share."""

    lengths: tuple[int, ...]
    """Tokens of each row."""
    at_labels: Tensor
    """int64[n]: places of the tokens that a label follows."""
    targets: Tensor
    """int64[n]: the labels."""
    num_examples: int
    """0 where there was nothing to run, and a single token is run for nothing."""
    reducer: int
    """Number of the reducer that the rows were expanded for."""


def _shapes(examples: Sequence[Example]) -> Iterator[tuple[int, tuple[tuple[int, int], ...], int, int]]:
    """(text tokens, sizes of images, images, videos) of each row."""
    if isinstance(examples, Examples):  # whole columns: making 66,000 rows would take seconds
        numbers = (examples.column(name).tolist() for name in ("num_tokens", "num_images", "num_videos"))
        for (num_tokens, *counts), sides in zip(
            zip(*numbers, strict=True), examples.column("sizes"), strict=True
        ):
            yield num_tokens, tuple(map(tuple, sides.reshape(-1, 2).tolist())), *counts
    else:
        for example in examples:
            num_images, num_videos = (len(example.media.get(kind, ())) for kind in ("image", "video"))
            yield len(example.ids), example.sizes[:num_images], num_images, num_videos


class Collator:
    """Expands placeholders, brings in the media, and pads.

    Args:
        processor: of the model, unreduced.
        family: around the model.
        reducer: by which placeholders are counted.
        kinds: of media that every micro batch brings to the model, blank where no row has any: under ZeRO 3 all ranks
            must run the same modules.
        num_frames: of a video.
        media: where images and videos come from; by default files, through the processor.

    Raises:
        UserError: a kind that the model does not take.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        reducer: Reducer,
        *,
        kinds: tuple[str, ...] = ("image",),
        num_frames: int = 1,
        media: Media | None = None,
    ) -> None:
        if other := [kind for kind in kinds if kind not in family.kinds]:
            raise UserError(
                f"the data holds {other[0]}s, which a {family.model_type!r} model does not take; take such rows out"
            )
        self.reducer, self.kinds, self.num_frames = reducer, kinds, num_frames
        self.family = family.without_weights()  # workers get a copy
        self.media = media or Processed(processor, self.family, reducer, num_frames=num_frames)
        tokenizer = processor.tokenizer
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def lengths(self, examples: Sequence[Example]) -> Tensor:
        """int64[rows]: tokens of each row after expansion, without opening anything.

        An image whose size is not known counts as the family's usual one.
        """

        @cache  # of 66,000 rows, many have pictures of the same size
        def num_visual(sizes: tuple[tuple[int, int] | None, ...], num_videos: int) -> int:
            images = self.family.num_example_tokens(self.reducer, sizes)
            return images + (
                num_videos * self.family.num_video_tokens(self.reducer, self.num_frames) if num_videos else 0
            )

        return torch.tensor(
            [
                num_tokens + num_visual(sizes or (None,) * num_images, num_videos) - num_images - num_videos
                for num_tokens, sizes, num_images, num_videos in _shapes(examples)
            ]
        )

    def _expand(self, example: Example, counts: dict[str, Iterator[int]]) -> tuple[list[int], list[int]]:
        kind_of = {self.family.placeholder_id(kind): kind for kind in example.media}
        ids, labels = [], []
        for token, label in zip(example.ids, example.labels, strict=True):
            count = next(counts[kind_of[token]]) if token in kind_of else 1
            ids += [token] * count
            labels += [label] * count
        return ids, labels

    def expanded(self, examples: Sequence[Example]) -> tuple[list[Ids], MediaInputs, dict[str, int]]:
        """The rows' (ids, labels) with as many placeholders as there are tokens, their media, and placeholders by kind."""
        media, counts = {}, {}
        for kind in self.kinds:
            there = any(kind in example.media for example in examples)
            media[kind] = self.media.load(kind, examples) if there else self.media.blank(kind)
            counts[kind] = self.media.counts(kind, media[kind]) if there else []
        iterators = {kind: iter(numbers) for kind, numbers in counts.items()}
        rows = [self._expand(example, iterators) for example in examples]
        return rows, media, {kind: sum(numbers) for kind, numbers in counts.items()}

    def __call__(self, examples: Sequence[Example], *, left: bool = False) -> PaddedBatch:
        """A micro batch, padded on the right, or on the `left` for generation."""
        rows, media, num_placeholders = self.expanded(examples)
        length = max(len(ids) for ids, _ in rows)

        def pad(values: list[int], value: int) -> list[int]:
            padding = [value] * (length - len(values))
            return padding + values if left else values + padding

        return PaddedBatch(
            input_ids=torch.tensor([pad(ids, self.pad_id) for ids, _ in rows]),
            media=media,
            num_placeholders=num_placeholders,
            attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
            labels=torch.tensor([pad(labels, IGNORED) for _, labels in rows]),
        )


class Packer:
    """Lays rows one behind the other, each from behind the shared prefix to the last token whose output is needed.

    Args:
        collate: expands the rows.
        num_prefix: tokens that every row begins with, and that are left out.
        reducer: number of the collator's reducer among the engine's.
    """

    def __init__(self, collate: Collator, *, num_prefix: int, reducer: int = 0) -> None:
        self.collate, self.num_prefix, self.reducer = collate, num_prefix, reducer

    def lengths(self, examples: Sequence[Example]) -> Tensor:
        """int64[rows]: tokens of each row that are run."""
        return self.collate.lengths(examples) - self.num_prefix - self._tails(examples)

    def _tails(self, examples: Sequence[Example]) -> Tensor:
        placeholders = [self.collate.family.placeholder_id(kind) for kind in self.collate.kinds]
        return torch.from_numpy(num_tail_tokens(examples, placeholders))

    def __call__(self, examples: Sequence[Example]) -> PackedBatch:
        """A micro batch; without rows, one of a single token, which is to count nothing."""
        rows, media, num_placeholders = self.collate.expanded(examples)
        tails = self._tails(examples).tolist() if examples else []
        parts, targets, at_labels, num_tokens = [], [], [], 0
        for (ids, labels), tail in zip(rows, tails, strict=True):
            stop = len(ids) - tail
            following = labels[self.num_prefix + 1 : stop + 1]
            at_labels += [num_tokens + place for place, label in enumerate(following) if label != IGNORED]
            targets += [label for label in following if label != IGNORED]
            parts.append(ids[self.num_prefix : stop])
            num_tokens += len(parts[-1])
        if not parts:
            parts, targets, at_labels = [[self.collate.pad_id]], [self.collate.pad_id], [0]
        return PackedBatch(
            input_ids=torch.tensor([*chain(*parts)]),
            media=media,
            num_placeholders=num_placeholders,
            lengths=tuple(map(len, parts)),
            at_labels=torch.tensor(at_labels),
            targets=torch.tensor(targets),
            num_examples=len(examples),
            reducer=self.reducer,
        )
