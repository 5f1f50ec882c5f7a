"""Two ways from rows to an optimizer step, for a benchmark to run side by side: the stock one, and that of `make tune`."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from data.batches.collate import MicroBatch, PackedBatch, Packer
from data.batches.dataset import Batcher, BatchPlan, MicroBatches, PackedBatcher, PaddedBatcher, has_media
from data.batches.packing import shared_prefix
from data.examples.tokens import Example, Examples
from scripts.bench.released import eager_copy, released_tokens
from scripts.bench.shapes import NUM_PREFIX, make_collator
from train.losses import FastLoss, ReferenceLoss
from vzip import UserError
from vzip.cost import packed_memory
from vzip.families import Family
from vzip.fast.language import PackedLanguage
from vzip.fast.segments import Segments
from vzip.reducers import Reducer
from vzip.reducers.base import VisionTokens

MOST, MULTIPLE, SPARE = 16_384, 256, 0.05
"""Tokens of a packed micro batch, much as `train/memory.py`, which needs DeepSpeed, chooses them; the share of a GPU's memory
that is left free."""


def released(family: Family) -> Family:
    """The family with its tower run the released way."""

    class Released(type(family)):  # type: ignore[misc]
        tower = eager_copy(family.tower)

        @classmethod
        def vision_tokens(
            cls, inner: Any, reducer: Reducer, pixel_values: Tensor, **kwargs: Any
        ) -> VisionTokens:
            return released_tokens(cls.tower, pixel_values)

    return Released(family.model)


class EnginePath:
    """One way to run the steps: its micro batches, its loss, and AdamW.

    Args:
        loss: of a micro batch.
        steps: micro batches of each step.
        device: where the model is.
    """

    def __init__(
        self, loss: ReferenceLoss | FastLoss, steps: Sequence[MicroBatches], device: torch.device
    ) -> None:
        self.loss, self.steps, self.device = loss, steps, device
        self.parameters = list(loss.family.projector.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)
        self.batches: list[list[MicroBatch]] = []
        self.num_done = 0

    def collate(self, number: int) -> list[MicroBatch]:
        """The micro batches of a step, on the CPU."""
        made = [self.steps[number][part] for part in range(len(self.steps[number]))]
        return [batch.pin_memory() for batch in made] if self.device.type == "cuda" else made

    def backward(
        self, number: int, batches: Sequence[MicroBatch], *, lap: Callable[[str], None] = lambda stage: None
    ) -> None:
        """Add the gradient of a step's mean loss. `lap` is told of the stages that are over."""
        for batch in batches:
            total, _ = self.loss(batch.each(lambda values: values.to(self.device, non_blocking=True)))
            lap("language forward")
            (total / self.steps[number].num_labels(0)).backward()
            lap("backward")

    def update(self) -> None:
        """AdamW, and gradients of zero."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """The next of the collated steps, the last one first."""
        number = (self.num_done - 1) % len(self.batches)
        self.backward(number, self.batches[number])
        self.update()
        self.num_done += 1

    def gradient(self, batches: Sequence[MicroBatch]) -> Tensor:
        """float32[numbers of the projector] of the micro batches of step 0."""
        self.backward(0, batches)
        found = torch.cat(
            [parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None]
        )
        self.optimizer.zero_grad()
        return found

    @property
    def num_slots(self) -> int:
        """Tokens that the language model runs for in all steps, with padding."""
        return sum(batch.input_ids.numel() for batch in chain(*self.batches))


def cut_micro_batches(
    steps: Sequence[Sequence[Example]], make_batcher: Callable[[Examples, BatchPlan], Batcher]
) -> list[MicroBatches]:
    """Micro batches of each step's rows."""
    batches_by_step = []
    for seed, step in enumerate(steps):
        examples = Examples.of(step)
        plan = BatchPlan(size=len(examples), world_size=1, num_steps=1, seed=seed)
        batcher = make_batcher(examples, plan)
        batches_by_step.append(MicroBatches(batcher, plan, rank=0, has_gradient=has_media(examples)))
    return batches_by_step


def make_fast(
    family: Family, reducer: Reducer, steps: Sequence[Sequence[Example]], *, tokens: int, device: torch.device
) -> EnginePath:
    """The way that `make tune` takes."""
    collate = make_collator(family, reducer)
    prefix = shared_prefix(Examples.of(chain(*steps)), [family.placeholder_id("image")])
    packer = Packer(collate, num_prefix=len(prefix))

    def make_batcher(examples: Examples, plan: BatchPlan) -> Batcher:
        num_run, has_gradient = packer.lengths(examples)[None], has_media(examples)
        return PackedBatcher(
            [packer], examples, plan, tokens=tokens, num_run=num_run, has_gradient=has_gradient
        )

    loss = FastLoss(family, [reducer], prefix=prefix, compiled=device.type == "cuda")
    return EnginePath(loss, cut_micro_batches(steps, make_batcher), device)


def make_reference(
    family: Family, reducer: Reducer, steps: Sequence[Sequence[Example]], *, micro: int, device: torch.device
) -> EnginePath:
    """The stock way."""
    make_batcher = partial(PaddedBatcher, make_collator(family, reducer), micro=micro)
    return EnginePath(
        ReferenceLoss(released(family), reducer, text_has_gradient=False),
        cut_micro_batches(steps, make_batcher),
        device,
    )


def fitting_tokens(family: Family, reducer: Reducer, device: torch.device) -> int:
    """Packed tokens of a micro batch that a GPU holds beside the weights, and no more than are of use."""
    if device.type != "cuda":
        return MOST
    room = int(torch.cuda.mem_get_info(device)[1] * (1 - SPARE)) - torch.cuda.memory_allocated(device)
    sizes = range(MULTIPLE, MOST + 1, MULTIPLE)
    fitting = bisect_right(
        sizes,
        room,
        key=lambda tokens: packed_memory(family, reducer, num_tokens=tokens, num_prefix=NUM_PREFIX),
    )
    if not fitting:
        raise UserError(
            "the GPU's memory does not hold a micro batch beside the weights; choose a smaller --shape"
        )
    return sizes[fitting - 1]


def kept_bytes(language: PackedLanguage, lengths: Sequence[int], prefix: Sequence[int] = ()) -> int:
    """Bytes that the fast path's language model keeps for the backward pass of rows of some lengths, its weights apart."""
    model: Any = language.model
    segments = Segments(lengths, language.prefixes(prefix, model.device))
    width, settings = model.config.hidden_size, {"device": model.device, "dtype": model.dtype}
    embeddings = torch.randn(sum(lengths), width, requires_grad=True, **settings)
    weights, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, or another would get its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        language(embeddings, segments, torch.tensor([0], device=model.device))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def kept_widths(family: Family, batch: PackedBatch, prefix: Sequence[int], device: torch.device) -> float:
    """Bytes that a layer of the fast path keeps of a token for the backward pass in bf16, in units of the width: the difference
    between language models of four layers and of three.
    """
    config, found = family.model.config.text_config, []
    for num_layers in (3, 4):
        shape = type(config).from_dict(config.to_dict() | {"num_hidden_layers": num_layers})
        with torch.device(device):
            model = (
                type(family.language_model)._from_config(shape, dtype=torch.bfloat16).requires_grad_(False)
            )
        found.append(kept_bytes(PackedLanguage(model), batch.lengths, prefix))
    return (found[1] - found[0]) / sum(batch.lengths) / config.hidden_size
