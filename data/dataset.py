"""From rows to padded micro batches, in an order that depends on seed and step alone.

Legend of shapes: M rows of a micro batch, L the longest row's tokens.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.media import Media, Processed
from data.tokens import Example, Examples
from vzip import UserError
from vzip.families import Family
from vzip.reducers import Reducer
from vzip.templates import IGNORED


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes."""

    input_ids: Tensor
    """int64[M, L], padded on the right."""
    attention_mask: Tensor
    """int64[M, L]."""
    labels: Tensor
    """int64[M, L], `IGNORED` where there is no loss."""
    media: dict[str, dict[str, Tensor]]
    """Of all the rows' images and videos, by kind, images first, what `vzip.media.normalised` makes the model's inputs of:
    pixels are uint8 until they are on the device. A blank image or video where no row has any."""
    num_placeholders: dict[str, int]
    """Placeholders in `input_ids` by kind; 0 where the kind is blank."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The batch with each tensor changed."""
        return replace(
            self,
            input_ids=change(self.input_ids),
            attention_mask=change(self.attention_mask),
            labels=change(self.labels),
            media={kind: {name: change(value) for name, value in inputs.items()} for kind, inputs in self.media.items()},
        )

    def pin_memory(self) -> "MicroBatch":
        """Asked for by torch's DataLoader: a GPU copies from such memory while it computes."""
        return self.each(Tensor.pin_memory)


def _permutation(num_rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def _shapes(examples: Sequence[Example]) -> Iterator[tuple[int, tuple[tuple[int, int], ...], int, int]]:
    """(text tokens, sizes of images, images, videos) of each row."""
    if isinstance(examples, Examples):  # whole columns: making 66,000 rows would take seconds
        numbers = (examples.column(name).tolist() for name in ("num_tokens", "num_images", "num_videos"))
        for (num_tokens, *counts), sides in zip(zip(*numbers, strict=True), examples.column("sizes"), strict=True):
            yield num_tokens, tuple(map(tuple, sides.reshape(-1, 2).tolist())), *counts
    else:
        for example in examples:
            num_images, num_videos = (len(example.media.get(kind, ())) for kind in ("image", "video"))
            yield len(example.ids), example.sizes[:num_images], num_images, num_videos


def _num_labels(examples: Sequence[Example]) -> Tensor:
    """int64[rows]: label tokens of each row."""
    if isinstance(examples, Examples):
        return torch.from_numpy(examples.column("num_labels")).long()
    return torch.tensor([example.num_labels for example in examples])


class Collator:
    """Expands placeholders, pads, and brings in the media.

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
            images = self.family.num_row_tokens(self.reducer, sizes)
            return images + (num_videos * self.family.num_video_tokens(self.reducer, self.num_frames) if num_videos else 0)

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

    def __call__(self, examples: Sequence[Example], *, left: bool = False) -> MicroBatch:
        """A micro batch, padded on the right, or on the `left` for generation."""
        media, counts = {}, {}
        for kind in self.kinds:
            there = any(kind in example.media for example in examples)
            media[kind] = self.media.load(kind, examples) if there else self.media.blank(kind)
            counts[kind] = self.media.counts(kind, media[kind]) if there else []
        iterators = {kind: iter(numbers) for kind, numbers in counts.items()}
        rows = [self._expand(example, iterators) for example in examples]
        length = max(len(ids) for ids, _ in rows)

        def pad(values: list[int], value: int) -> list[int]:
            padding = [value] * (length - len(values))
            return padding + values if left else values + padding

        return MicroBatch(
            input_ids=torch.tensor([pad(ids, self.pad_id) for ids, _ in rows]),
            attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
            labels=torch.tensor([pad(labels, IGNORED) for _, labels in rows]),
            media=media,
            num_placeholders={kind: sum(numbers) for kind, numbers in counts.items()},
        )


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: micro x accumulation x world_size rows. Ranks and parts only cut the same rows otherwise."""

    micro: int
    accumulation: int
    world_size: int
    num_steps: int
    seed: int

    @property
    def size(self) -> int:
        return self.micro * self.accumulation * self.world_size

    def __str__(self) -> str:
        cut = f"{self.micro} micro x {self.accumulation} accumulation x {self.world_size} ranks"
        return f"{self.num_steps:,} steps of {self.size} rows = {cut}"


class MicroBatches(Dataset[MicroBatch]):
    """Item i is a rank's micro batch i: step i // accumulation, part i % accumulation.

    Step s takes rows s * size ... of an endless stream of epochs, each a permutation drawn from seed and epoch. Within a step,
    whose loss is a sum over its rows in whatever order, the longest rows come first: rows of a micro batch are of like length
    and need little padding, the ranks' micro batches too, and the step's largest need of memory is its first.
    """

    def __init__(self, examples: Sequence[Example], collate: Collator, plan: BatchPlan, *, rank: int) -> None:
        self.examples, self.collate, self.plan, self.rank = examples, collate, plan, rank
        self._lengths, self._num_labels = collate.lengths(examples), _num_labels(examples)
        num_epochs = -(-plan.num_steps * plan.size // len(examples))
        stream = torch.cat([_permutation(len(examples), plan.seed, epoch) for epoch in range(num_epochs)])
        steps = stream[: plan.num_steps * plan.size].view(plan.num_steps, plan.size)
        longest_first = self._lengths[steps].argsort(dim=1, descending=True, stable=True)
        self.order = steps.gather(1, longest_first).flatten().tolist()

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.accumulation

    def _rows(self, step: int) -> list[int]:
        return self.order[step * self.plan.size : (step + 1) * self.plan.size]

    def num_labels(self, step: int) -> int:
        """Label tokens of the whole global batch of a step, on all ranks."""
        return int(self._num_labels[self._rows(step)].sum())

    def num_tokens(self, step: int) -> int:
        """Tokens of the whole global batch of a step, on all ranks, after expansion and without padding."""
        return int(self._lengths[self._rows(step)].sum())

    def __getitem__(self, index: int) -> MicroBatch:
        step, part = divmod(index, self.plan.accumulation)
        # The ranks take turns in having the longer rows, so that none has the longest of every part.
        place = self.plan.world_size - 1 - self.rank if part % 2 else self.rank
        start = (part * self.plan.world_size + place) * self.plan.micro
        return self.collate([self.examples[row] for row in self._rows(step)[start : start + self.plan.micro]])


@contextmanager
def explain_workers() -> Iterator[None]:
    """Around what waits for workers, or may be interrupted by the end of one: their faults come out as UserError."""
    try:
        yield
    except (UserError, RuntimeError) as error:
        if isinstance(error, UserError):
            message = str(error).rsplit("UserError: ", 1)[-1].strip()  # a worker's comes with its traceback in the message
        elif "DataLoader worker" in str(error):
            message = (
                f"a process that loads data was ended from outside, mostly because memory ran out ({str(error).strip()}); "
                f"lower data.num_workers, or give the machine (in a container also /dev/shm) more memory, and run the same "
                f"command again: it resumes"
            )
        else:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold torch's loader, which takes its workers along when it goes
        raise UserError(message) from None


def loader(batches: MicroBatches, *, first: int, num_workers: int) -> Iterator[MicroBatch]:
    """Micro batches from number `first` on, made by `num_workers` processes of one thread each (0: by this one).

    Each worker is two batches ahead, which lie in shared memory; pinned, where there is a GPU.

    Raises:
        UserError: a picture or video that can't be read any more, or a worker that the system has ended.
    """
    with explain_workers():
        yield from DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, len(batches)),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
