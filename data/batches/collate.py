"""From rows to micro batches: padded, or packed one behind the other.

Legend of shapes: M rows of a micro batch, L the longest row's tokens; T tokens of packed rows, n of them followed by a label.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from data.batches.media import Media, Processed
from data.batches.packing import num_tail_tokens
from data.examples.tokens import Example, Examples, FlatTokens, pairs_of_sides
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


def _visual_shapes(examples: Examples) -> Iterator[tuple[tuple[tuple[int, int] | None, ...], int]]:
    """(sizes of the images, number of videos) of each example. An image whose size is not known has None."""
    columns = zip(
        examples.column("num_images").tolist(),
        examples.column("num_videos").tolist(),
        examples.column("sizes"),
        strict=True,
    )
    for num_images, num_videos, sides in columns:
        sizes: tuple[tuple[int, int] | None, ...] = pairs_of_sides(sides)
        yield sizes or (None,) * num_images, num_videos


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

    def lengths(self, examples: Examples) -> Tensor:
        """int64[examples]: tokens of each example after expansion, without opening any file.

        An image whose size is not known counts as one of the family's usual size.
        """

        # Many of the 66,000 examples of a usual run have images of the same size.
        @cache
        def num_visual_tokens(sizes: tuple[tuple[int, int] | None, ...], num_videos: int) -> int:
            num_tokens = self.family.num_example_tokens(self.reducer, sizes)
            if num_videos:
                num_tokens += num_videos * self.family.num_video_tokens(self.reducer, self.num_frames)
            return num_tokens

        num_visual = [num_visual_tokens(*shape) for shape in _visual_shapes(examples)]
        num_placeholders = examples.column("num_images") + examples.column("num_videos")
        num_text = examples.column("num_tokens").astype(np.int64) - num_placeholders
        return torch.from_numpy(num_text) + torch.tensor(num_visual, dtype=torch.int64)

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
    """Lays examples one behind the other, each from behind the shared prefix to the last token whose output is needed.

    Args:
        collator: expands the examples.
        num_prefix: tokens that every example begins with, and that are left out.
        reducer: number of the collator's reducer among those of the run.
    """

    def __init__(self, collator: Collator, *, num_prefix: int, reducer: int = 0) -> None:
        self.collator = collator
        self.num_prefix = num_prefix
        self.reducer = reducer
        self.placeholders = [collator.family.placeholder_id(kind) for kind in collator.kinds]

    def lengths(self, examples: Examples) -> Tensor:
        """int64[examples]: tokens of each example that are run."""
        tails = num_tail_tokens(examples.flat_tokens(), self.placeholders)
        return self.collator.lengths(examples) - self.num_prefix - torch.from_numpy(tails)

    def __call__(self, examples: Sequence[Example]) -> PackedBatch:
        """A micro batch. Without examples it has a single token, whose loss must not count."""
        expanded, media, num_placeholders = self.collator.expanded(examples)

        input_ids: list[int] = []
        lengths: list[int] = []
        at_labels: list[int] = []
        targets: list[int] = []
        for (ids, labels), tail in zip(expanded, self._num_tail_tokens(expanded), strict=True):
            stop = len(ids) - tail

            # A token predicts the next one, so the label that matters to it is one place further on.
            next_labels = labels[self.num_prefix + 1 : stop + 1]
            for position, label in enumerate(next_labels, start=len(input_ids)):
                if label != IGNORED:
                    at_labels.append(position)
                    targets.append(label)

            input_ids += ids[self.num_prefix : stop]
            lengths.append(stop - self.num_prefix)

        if not expanded:
            input_ids = targets = [self.collator.pad_id]
            lengths = [1]
            at_labels = [0]

        return PackedBatch(
            input_ids=torch.tensor(input_ids),
            media=media,
            num_placeholders=num_placeholders,
            lengths=tuple(lengths),
            at_labels=torch.tensor(at_labels),
            targets=torch.tensor(targets),
            num_examples=len(examples),
            reducer=self.reducer,
        )

    def _num_tail_tokens(self, expanded: Sequence[Ids]) -> list[int]:
        """Tokens at the end of each example that are not run. The tail has no placeholder, so expansion does not matter."""
        if not expanded:
            return []
        tails: list[int] = num_tail_tokens(FlatTokens.of(expanded), self.placeholders).tolist()
        return tails
