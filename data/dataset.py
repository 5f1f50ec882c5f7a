"""From rows to padded micro batches, in an order that depends on seed and step alone.

Legend of shapes: M rows of a micro batch, L the longest row's tokens, I images of the micro batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.conversations import Row
from data.pictures import open_picture
from vzip import UserError
from vzip.templates import IGNORED, IMAGE, Template, encode


@dataclass(frozen=True)
class Example:
    """A tokenized row: one placeholder id an image, not yet expanded."""

    ids: list[int]
    labels: list[int]
    images: tuple[Path, ...]

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes."""

    input_ids: Tensor
    """int64[M, L], padded on the right."""
    attention_mask: Tensor
    """int64[M, L]."""
    labels: Tensor
    """int64[M, L], `IGNORED` where there is no loss."""
    pixel_values: Tensor
    """float32[I, 3, height, width]; a blank one where no row has an image."""
    has_images: bool


def tokenize(
    rows: Sequence[Row], template: Template, tokenizer: Any, folder: Path, *, max_tokens: int
) -> tuple[list[Example], int]:
    """The rows' ids and labels, and how many rows were cut at `max_tokens` text tokens (as LLaVA cuts them)."""
    examples, num_cut = [], 0
    for row in rows:
        ids, labels = encode(template, tokenizer, row.turns)
        num_cut += len(ids) > max_tokens
        ids, labels = ids[:max_tokens], labels[:max_tokens]
        images = row.images[: ids.count(tokenizer.convert_tokens_to_ids(IMAGE))]
        examples.append(Example(ids, labels, tuple(folder / image for image in images)))
    return examples, num_cut


def _permutation(num_rows: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


class Collator:
    """Expands placeholders, pads, and processes pictures.

    Args:
        image_processor: of the model's processor.
        image_id: id of the placeholder token.
        num_image_tokens: placeholders an image takes.
        pad_id: id for padding.
    """

    def __init__(self, image_processor: Any, *, image_id: int, num_image_tokens: int, pad_id: int) -> None:
        self.image_processor = image_processor
        self.image_id = image_id
        self.num_image_tokens = num_image_tokens
        self.pad_id = pad_id

    @classmethod
    def of(cls, processor: Any, num_image_tokens: int) -> "Collator":
        """The collator of a model's (unreduced) processor."""
        tokenizer = processor.tokenizer
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        return cls(processor.image_processor, image_id=image_id, num_image_tokens=num_image_tokens, pad_id=pad_id)

    def _expand(self, example: Example) -> tuple[list[int], list[int]]:
        ids, labels = [], []
        for token, label in zip(example.ids, example.labels, strict=True):
            count = self.num_image_tokens if token == self.image_id else 1
            ids += [token] * count
            labels += [label] * count
        return ids, labels

    def _pixel_values(self, paths: Sequence[Path]) -> Tensor:
        try:
            pictures = [open_picture(path) for path in paths]
        except (OSError, ValueError) as error:
            raise UserError(f"a picture that was readable before training is not any more: {error}") from error
        pixel_values: Tensor = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pixel_values

    def _blank(self) -> Tensor:
        pixel_values: Tensor = self.image_processor([Image.new("RGB", (32, 32))], return_tensors="pt")["pixel_values"]
        return torch.zeros_like(pixel_values)

    def __call__(self, examples: Sequence[Example], *, left: bool = False) -> MicroBatch:
        """A micro batch, padded on the right, or on the `left` for generation."""
        rows = [self._expand(example) for example in examples]
        length = max(len(ids) for ids, _ in rows)

        def pad(values: list[int], value: int) -> list[int]:
            padding = [value] * (length - len(values))
            return padding + values if left else values + padding

        paths = [path for example in examples for path in example.images]
        return MicroBatch(
            input_ids=torch.tensor([pad(ids, self.pad_id) for ids, _ in rows]),
            attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
            labels=torch.tensor([pad(labels, IGNORED) for _, labels in rows]),
            pixel_values=self._pixel_values(paths) if paths else self._blank(),
            has_images=bool(paths),
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
