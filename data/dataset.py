"""From rows to padded micro batches, in an order that depends on seed and step alone.

Legend of shapes: M rows of a micro batch, L the longest row's tokens, I images of the micro batch.
"""

from collections.abc import Callable, Sequence
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
        images = tuple(folder / image for image in row.images)
        examples.append(Example(ids[:max_tokens], labels[:max_tokens], images))
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


class MicroBatches(Dataset[MicroBatch]):
    """Item i is micro batch i of this rank: step i // accumulation, part i % accumulation.

    A global batch is `micro * accumulation * world_size` consecutive rows of the stream; part p of rank r takes every
    row whose place in the batch, divided by `micro`, is p * world_size + r. So ranks and parts only cut it differently.
    """

    def __init__(
        self, examples: Sequence[Example], collate: Callable[..., MicroBatch], *, micro: int, accumulation: int, rank: int,
        world_size: int, num_steps: int, seed: int,
    ) -> None:
        self.examples, self.collate = examples, collate
        self.micro, self.accumulation, self.rank, self.world_size = micro, accumulation, rank, world_size
        self.num_steps, self.seed = num_steps, seed
        num_epochs = -(-num_steps * self.global_batch // len(examples))
        self.order = torch.cat([_permutation(len(examples), seed, epoch) for epoch in range(num_epochs)]).tolist()

    @property
    def global_batch(self) -> int:
        return self.micro * self.accumulation * self.world_size

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def num_labels(self, step: int) -> int:
        """Label tokens of the whole global batch of a step, on all ranks."""
        batch = self.order[step * self.global_batch : (step + 1) * self.global_batch]
        return sum(self.examples[row].num_labels for row in batch)

    def __getitem__(self, index: int) -> MicroBatch:
        step, part = divmod(index, self.accumulation)
        start = step * self.global_batch + (part * self.world_size + self.rank) * self.micro
        return self.collate([self.examples[row] for row in self.order[start : start + self.micro]])


def loader(batches: MicroBatches, *, first: int, num_workers: int) -> "DataLoader[MicroBatch]":
    """Micro batches from number `first` on, decoded by `num_workers` processes (0: by this one)."""
    return DataLoader(batches, batch_size=None, sampler=range(first, len(batches)), num_workers=num_workers)
