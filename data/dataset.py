"""From rows to padded micro batches, in an order that depends on seed and step alone.

Legend of shapes: M rows of a micro batch, L the longest row's tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.pictures import open_picture
from data.tokens import Example
from data.videos import read_frames
from vzip import UserError
from vzip.families import Family
from vzip.media import model_inputs
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
    """What the model takes of all the rows' images and videos, by kind, images first; a blank one where no row has any."""
    num_placeholders: dict[str, int]
    """Placeholders in `input_ids` by kind; 0 where the kind is blank."""


def _permutation(num_rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


class Collator:
    """Expands placeholders, pads, and processes pictures.

    Args:
        processor: of the model, unreduced.
        family: around the model.
        reducer: by which placeholders are counted.
        kinds: of media that every micro batch brings to the model, blank where no row has any: under ZeRO 3 all ranks
            must run the same modules.
        num_frames: of a video.

    Raises:
        UserError: a kind that the model does not take.
    """

    def __init__(
        self, processor: Any, family: Family, reducer: Reducer, *, kinds: tuple[str, ...] = ("image",), num_frames: int = 1
    ) -> None:
        if other := [kind for kind in kinds if kind not in family.kinds]:
            raise UserError(
                f"the data holds {other[0]}s, which a {family.model_type!r} model does not take; take such rows out"
            )
        self.processor, self.reducer, self.kinds, self.num_frames = processor, reducer, kinds, num_frames
        self.family = family.without_weights()  # workers get a copy
        tokenizer = processor.tokenizer
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _process(self, kind: str, rows: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """The model's inputs for rows of pictures, or of videos as lists of frames."""
        if kind == "video":
            made = self.processor.video_processor(list(chain(*rows)), return_tensors="pt")
        else:
            made = self.processor.image_processor([list(row) for row in rows], return_tensors="pt")
        return model_inputs(kind, made)

    def _open(self, kind: str, path: Path) -> Any:
        try:
            return open_picture(path) if kind == "image" else read_frames(path, self.num_frames)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{path} was readable before training and is not any more: {error}") from error

    def _load(self, kind: str, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [[self._open(kind, path) for path in example.media[kind]] for example in examples if kind in example.media]
        return self._process(kind, rows)

    def _blank(self, kind: str) -> dict[str, Tensor]:
        black = Image.new("RGB", (32, 32))
        return self._process(kind, [[black if kind == "image" else [black]]])

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
            there = sum(len(example.media.get(kind, ())) for example in examples)
            media[kind] = self._load(kind, examples) if there else self._blank(kind)
            counts[kind] = [self.family.num_processed_tokens(self.reducer, kind, media[kind], index) for index in range(there)]
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

    Step s takes rows s * size ... of an endless stream of epochs, each a permutation drawn from seed and epoch.
    """

    def __init__(self, examples: Sequence[Example], collate: Collator, plan: BatchPlan, *, rank: int) -> None:
        self.examples, self.collate, self.plan, self.rank = examples, collate, plan, rank
        num_epochs = -(-plan.num_steps * plan.size // len(examples))
        self.order = torch.cat([_permutation(len(examples), plan.seed, epoch) for epoch in range(num_epochs)]).tolist()

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.accumulation

    def num_labels(self, step: int) -> int:
        """Label tokens of the whole global batch of a step, on all ranks."""
        batch = self.order[step * self.plan.size : (step + 1) * self.plan.size]
        return sum(self.examples[row].num_labels for row in batch)

    def __getitem__(self, index: int) -> MicroBatch:
        step, part = divmod(index, self.plan.accumulation)
        start = step * self.plan.size + (part * self.plan.world_size + self.rank) * self.plan.micro
        return self.collate([self.examples[row] for row in self.order[start : start + self.plan.micro]])


def loader(batches: MicroBatches, *, first: int, num_workers: int) -> Iterator[MicroBatch]:
    """Micro batches from number `first` on, decoded by `num_workers` processes (0: by this one)."""
    try:
        yield from DataLoader(batches, batch_size=None, sampler=range(first, len(batches)), num_workers=num_workers)
    except UserError as error:  # a worker's error comes with its traceback in the message
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
