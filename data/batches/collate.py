"""Build micro batches from examples: padded, or packed one behind the other.

Legend of shapes: M examples of a micro batch, L tokens of its longest example. If packed: T tokens
of all examples together, n of them followed by a label.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from data.batches.media import Media, ModelMedia, ProcessedMedia
from data.batches.packing import num_tail_tokens
from data.examples.tokens import Example, Examples, FlatTokens, pairs_of_sides
from vzip import UserError
from vzip.families import Family
from vzip.reducers import Reducer
from vzip.templates.encode import IGNORED

Ids = tuple[list[int], list[int]]
"""Token ids and labels of an example."""
Sizes = tuple[tuple[int, int] | None, ...]
"""(height, width) in pixels of each image of an example. None if a size is not known."""


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass."""

    input_ids: Tensor
    """int64[M, L] if padded, int64[T] if packed."""
    media: dict[str, ModelMedia]
    """All images and all videos of the examples, by kind, images first.

    Pixels are uint8 until they are on the device. If no example has any of a kind, there is one
    blank image or video.
    """
    num_placeholders: dict[str, int]
    """Placeholders in `input_ids` by kind. 0 if the only image or video is blank."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to each tensor, e.g. move it to a device."""
        changed: dict[str, Any] = {}
        changed["media"] = {kind: media.map(change) for kind, media in self.media.items()}

        # The other tensors are fields of the subclasses.
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
        return replace(self, **changed)

    def to(self, device: torch.device) -> Self:
        """Copy to a device, without waiting for copies from pinned memory."""
        return self.map(lambda values: values.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Move to memory that a GPU copies from while it computes. DataLoader calls this."""
        return self.map(Tensor.pin_memory)


@dataclass(frozen=True)
class PaddedBatch(MicroBatch):
    """Examples padded to one length."""

    attention_mask: Tensor
    """int64[M, L]."""
    labels: Tensor
    """int64[M, L], `IGNORED` where there is no loss."""


@dataclass(frozen=True)
class PackedBatch(MicroBatch):
    """Examples one behind the other, without the prefix that all of them share."""

    lengths: tuple[int, ...]
    """Tokens of each example."""
    at_labels: Tensor
    """int64[n]: positions of the tokens that a label follows."""
    targets: Tensor
    """int64[n]: these labels."""
    num_examples: int
    """0 if there was nothing to run. Then a single token is run, whose loss does not count."""
    reducer: int
    """Number of the reducer that the examples were expanded for."""


class Expanded(NamedTuple):
    """Examples with their images and videos."""

    ids: list[Ids]
    """Ids and labels of each example, with as many placeholders as the model has visual tokens."""
    media: dict[str, ModelMedia]
    """All images and all videos, by kind."""
    num_placeholders: dict[str, int]
    """Placeholders of all examples, by kind."""


class Collator:
    """Expands placeholders, adds images and videos, and pads.

    Args:
        processor: the model's processor, unreduced.
        family: the model's family.
        reducer: the reducer that placeholders are counted for.
        kinds: kinds of media that every micro batch brings to the model, blank if no example has
            any. Under ZeRO 3 all ranks must run the same modules.
        num_frames: frames taken of a video.
        media: the source of images and videos. By default files, run through the processor.

    Raises:
        UserError: the model does not take one of the kinds.
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
        for kind in kinds:
            if kind not in family.kinds:
                raise UserError(
                    f"the data holds {kind}s, which a {family.model_type!r} model does not take; "
                    f"take such examples out"
                )

        self.reducer = reducer
        self.kinds = kinds
        self.num_frames = num_frames
        # Each data worker gets a copy of the collator, which must not hold the model's weights.
        self.family = family.without_weights()
        self.family.read_processor(processor)
        self.media = media or ProcessedMedia(processor, self.family, reducer, num_frames=num_frames)

        # Some tokenizers have no padding token. Any token will do: the attention mask hides it.
        tokenizer = processor.tokenizer
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = tokenizer.eos_token_id

    def lengths(self, examples: Examples) -> Tensor:
        """int64[examples]: count the tokens of each example after expansion. Opens no file.

        An image whose size is not known counts as one of the family's usual size.
        """

        # Many of the 66,000 examples of a usual run have images of the same size.
        @cache
        def num_visual_tokens(sizes: Sizes, num_videos: int) -> int:
            num_tokens = self.family.num_example_tokens(self.reducer, sizes)
            if num_videos:
                num_tokens += num_videos * self.family.num_video_tokens(self.reducer, self.num_frames)
            return num_tokens

        # Each placeholder is replaced by visual tokens, so it is not counted itself.
        num_visual = [num_visual_tokens(*shape) for shape in _visual_shapes(examples)]
        num_placeholders = examples.column("num_images") + examples.column("num_videos")
        num_text = examples.column("num_tokens").astype(np.int64) - num_placeholders
        return torch.from_numpy(num_text) + torch.tensor(num_visual, dtype=torch.int64)

    def expand(self, examples: Sequence[Example]) -> Expanded:
        """Load images and videos, and repeat each placeholder once per visual token."""
        media: dict[str, ModelMedia] = {}
        counts: dict[str, list[int]] = {}
        for kind in self.kinds:
            # If no example has any, a blank one keeps all ranks at the same modules. It has no
            # placeholder, so its visual tokens go nowhere.
            if any(kind in example.media for example in examples):
                media[kind] = self.media.load(kind, examples)
                counts[kind] = self.media.counts(kind, media[kind])
            else:
                media[kind] = self.media.blank(kind)
                counts[kind] = []

        # The media of all examples are in one list per kind, so all examples share its iterator.
        remaining = {kind: iter(numbers) for kind, numbers in counts.items()}
        ids = [self._repeat_placeholders(example, remaining) for example in examples]

        num_placeholders = {kind: sum(numbers) for kind, numbers in counts.items()}
        return Expanded(ids, media, num_placeholders)

    def _repeat_placeholders(self, example: Example, counts: dict[str, Iterator[int]]) -> Ids:
        """Repeat each placeholder, and its label, as often as the next count of its kind says."""
        # Ids of the placeholders that this example has. All other tokens stand for themselves.
        kind_of = {self.family.placeholder_id(kind): kind for kind in example.media}
        ids: list[int] = []
        labels: list[int] = []
        for token, label in zip(example.ids, example.labels, strict=True):
            count = next(counts[kind_of[token]]) if token in kind_of else 1
            ids += [token] * count
            labels += [label] * count
        return ids, labels

    def __call__(self, examples: Sequence[Example], *, left: bool = False) -> PaddedBatch:
        """Build a micro batch, padded on the right, or on the left for generation."""
        expanded = self.expand(examples)
        length = max(len(ids) for ids, _ in expanded.ids)

        # For generation the padding is on the left: new tokens continue the end of each example.
        def pad(values: list[int], value: int) -> list[int]:
            padding = [value] * (length - len(values))
            return padding + values if left else values + padding

        input_ids = []
        attention_mask = []
        padded_labels = []
        for ids, labels in expanded.ids:
            input_ids.append(pad(ids, self.pad_id))
            attention_mask.append(pad([1] * len(ids), 0))
            padded_labels.append(pad(labels, IGNORED))

        return PaddedBatch(
            input_ids=torch.tensor(input_ids),
            media=expanded.media,
            num_placeholders=expanded.num_placeholders,
            attention_mask=torch.tensor(attention_mask),
            labels=torch.tensor(padded_labels),
        )


def _visual_shapes(examples: Examples) -> Iterator[tuple[Sizes, int]]:
    """Yield (sizes of the images, number of videos) of each example, from whole columns."""
    # Building 66,000 `Example` objects would take seconds.
    columns = zip(
        examples.column("num_images").tolist(),
        examples.column("num_videos").tolist(),
        examples.column("sizes"),
        strict=True,
    )
    for num_images, num_videos, sides in columns:
        # Without recorded sizes, only the number of images is known.
        sizes = pairs_of_sides(sides)
        yield sizes or (None,) * num_images, num_videos


class Packer:
    """Joins examples to one sequence, without the tokens that need not be run.

    These tokens are the prefix that all examples share, and each example's tail, whose output no
    loss needs: see `data.batches.packing`.

    Args:
        collator: expands the examples.
        num_prefix: number of tokens at the beginning of every example that are left out.
        reducer: number of the collator's reducer among the run's reducers.
    """

    def __init__(self, collator: Collator, *, num_prefix: int, reducer: int = 0) -> None:
        self.collator = collator
        self.num_prefix = num_prefix
        self.reducer = reducer
        self.placeholders = [collator.family.placeholder_id(kind) for kind in collator.kinds]

    def lengths(self, examples: Examples) -> Tensor:
        """int64[examples]: count the tokens of each example that are run."""
        tails = num_tail_tokens(examples.flat_tokens(), self.placeholders)
        return self.collator.lengths(examples) - self.num_prefix - torch.from_numpy(tails)

    def __call__(self, examples: Sequence[Example]) -> PackedBatch:
        """Build a micro batch.

        Without examples it has a single token, whose loss must not count.
        """
        expanded = self.collator.expand(examples)
        tails = self._num_tail_tokens(expanded.ids)

        input_ids: list[int] = []
        lengths: list[int] = []
        at_labels: list[int] = []
        targets: list[int] = []
        for (ids, labels), tail in zip(expanded.ids, tails, strict=True):
            stop = len(ids) - tail

            # A token predicts the next one, so its label is one position further.
            next_labels = labels[self.num_prefix + 1 : stop + 1]
            for position, label in enumerate(next_labels, start=len(input_ids)):
                if label != IGNORED:
                    at_labels.append(position)
                    targets.append(label)

            input_ids += ids[self.num_prefix : stop]
            lengths.append(stop - self.num_prefix)

        # A rank without examples runs the same modules too. Otherwise the others wait for ever.
        if not expanded.ids:
            input_ids = targets = [self.collator.pad_id]
            lengths = [1]
            at_labels = [0]

        return PackedBatch(
            input_ids=torch.tensor(input_ids),
            media=expanded.media,
            num_placeholders=expanded.num_placeholders,
            lengths=tuple(lengths),
            at_labels=torch.tensor(at_labels),
            targets=torch.tensor(targets),
            num_examples=len(examples),
            reducer=self.reducer,
        )

    def _num_tail_tokens(self, ids: Sequence[Ids]) -> list[int]:
        """Count the tokens at the end of each expanded example that are not run."""
        if not ids:
            return []

        # A tail holds no placeholder, so it is as long after the expansion as before.
        tails: list[int] = num_tail_tokens(FlatTokens.of(ids), self.placeholders).tolist()
        return tails
