"""Two paths from examples to an optimizer step: the stock path, and the path of `make tune`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from data.batches.collate import Collator, MicroBatch, PackedBatch, Packer
from data.batches.dataset import BatchPlan, MicroBatches, PackedBatcher, PaddedBatcher, has_media
from data.batches.packing import shared_prefix
from data.examples.tokens import Examples
from scripts.bench.examples import NUM_PREFIX, make_collator
from scripts.bench.released import eager_copy, released_tokens
from train.losses import FastLoss, ReferenceLoss
from train.memory import CUDA_CONTEXT, MAX_TOKENS, Card, largest_fitting
from vzip import UserError
from vzip.cost import packed_memory
from vzip.families import Family
from vzip.fast.language import PackedLanguage
from vzip.fast.segments import Segments
from vzip.reducers import Reducer
from vzip.reducers.base import VisionTokens


class EnginePath:
    """One path: its micro batches, its loss, and AdamW.

    Args:
        loss: the loss of a micro batch.
        batches: the micro batches of all steps.
        device: where the model is.

    Attributes:
        collated: the micro batches of each step on the CPU, once `collate_all` has run.
    """

    def __init__(self, loss: ReferenceLoss | FastLoss, batches: MicroBatches, device: torch.device) -> None:
        self.loss = loss
        self.batches = batches
        self.device = device
        self.parameters = list(loss.family.projector.parameters())

        # At a learning rate of 0 the weights stay, so that all steps can be compared.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)
        self.collated: list[list[MicroBatch]] = []
        self._next_step = -1

    def collate(self, step: int) -> list[MicroBatch]:
        """Build the micro batches of a step on the CPU, as the workers of a data loader do."""
        # Micro batches have numbers that count on from step to step.
        indices = range(self.batches.first_index(step), self.batches.first_index(step + 1))
        micro_batches = [self.batches[index] for index in indices]

        # The GPU copies pinned memory while it computes.
        if self.device.type == "cuda":
            return [micro_batch.pin_memory() for micro_batch in micro_batches]
        return micro_batches

    def collate_all(self) -> None:
        """Build the micro batches of all steps."""
        self.collated = [self.collate(step) for step in range(self.batches.plan.num_steps)]

    def backward(
        self,
        step: int,
        micro_batches: Sequence[MicroBatch],
        *,
        lap: Callable[[str], None] = lambda stage: None,
    ) -> None:
        """Add the gradient of the step's mean loss over some of its micro batches.

        Args:
            step: number of the step.
            micro_batches: micro batches that `collate` built.
            lap: called with the name of each stage when it is over.
        """
        # Dividing by the labels of the whole step gives its mean, however it is cut.
        num_labels = self.batches.num_labels(step)
        for micro_batch in micro_batches:
            on_device = micro_batch.to(self.device)
            loss_sum, _ = self.loss(on_device)
            lap("language forward")
            (loss_sum / num_labels).backward()
            lap("backward")

    def update(self) -> None:
        """Let AdamW step, and set the gradients to zero."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run_next_step(self) -> None:
        """Run the next of the collated steps, beginning with the last one.

        The first run is not timed, so the timed ones begin with step 0.
        """
        self.backward(self._next_step % len(self.collated), self.collated[self._next_step])
        self.update()
        self._next_step = (self._next_step + 1) % len(self.collated)

    def gradient(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Compute the gradient over some micro batches of step 0: float32[projector parameters]."""
        self.backward(0, micro_batches)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        gradient = torch.cat([values.flatten() for values in gradients])
        self.optimizer.zero_grad()
        return gradient

    @property
    def num_slots(self) -> int:
        """Tokens that the language model runs for in all steps, padding included."""
        total = 0
        for micro_batches in self.collated:
            total += sum(micro_batch.input_ids.numel() for micro_batch in micro_batches)
        return total


def pack_batches(
    collator: Collator, examples: Examples, plan: BatchPlan, *, tokens: int
) -> tuple[MicroBatches, list[int]]:
    """Cut steps into packed micro batches, as in training.

    Args:
        collator: of the model.
        examples: the examples of all steps.
        plan: the steps.
        tokens: packed tokens of a micro batch.

    Returns:
        (the micro batches, ids of the prefix that all examples share)
    """
    prefix = shared_prefix(examples, [collator.family.placeholder_id(kind) for kind in collator.kinds])
    packer = Packer(collator, num_prefix=len(prefix))
    has_gradient = has_media(examples)
    batcher = PackedBatcher(
        [packer],
        examples,
        plan,
        tokens=tokens,
        num_run=packer.lengths(examples)[None],
        has_gradient=has_gradient,
    )
    return MicroBatches(batcher, plan, rank=0, has_gradient=has_gradient), prefix


def make_fast(
    family: Family,
    reducer: Reducer,
    examples: Examples,
    plan: BatchPlan,
    *,
    tokens: int,
    device: torch.device,
) -> EnginePath:
    """Make the path of `make tune`, with micro batches of `tokens` packed tokens."""
    batches, prefix = pack_batches(make_collator(family, reducer), examples, plan, tokens=tokens)

    # Compiled kernels pay on a GPU only, as in training.
    loss = FastLoss(family, [reducer], prefix=prefix, compiled=device.type == "cuda")
    loss.run_prefix(device)
    return EnginePath(loss, batches, device)


def make_reference(
    family: Family,
    reducer: Reducer,
    examples: Examples,
    plan: BatchPlan,
    *,
    micro: int,
    device: torch.device,
) -> EnginePath:
    """Make the stock path, with the authors' vision tower and `micro` examples per micro batch."""
    batcher = PaddedBatcher(make_collator(family, reducer), examples, plan, micro=micro)
    batches = MicroBatches(batcher, plan, rank=0, has_gradient=has_media(examples))
    loss = ReferenceLoss(with_released_tower(family), reducer, text_has_gradient=False)
    return EnginePath(loss, batches, device)


def with_released_tower(family: Family) -> Family:
    """Return the family with its tower run as in the authors' code."""
    eager = eager_copy(family.tower)

    # A subclass of the family's own class, so that everything but the tower stays.
    class WithReleasedTower(type(family)):  # type: ignore[misc]
        tower = eager

        def vision_tokens(self, reducer: Reducer, pixel_values: Tensor, **options: Any) -> VisionTokens:
            return released_tokens(eager, pixel_values)

    return WithReleasedTower(family.model, anyres=family.anyres)


def fitting_tokens(family: Family, reducer: Reducer, device: torch.device) -> int:
    """Choose the packed tokens of a micro batch: what the GPU holds, but at most 16,384.

    Raises:
        UserError: not even a small micro batch fits.
    """
    if device.type != "cuda":
        return MAX_TOKENS

    # The weights are on the GPU already, so what is allocated counts in place of an estimate.
    card = Card(torch.cuda.mem_get_info(device)[1], name="the GPU")
    room = card.usable - CUDA_CONTEXT - torch.cuda.memory_allocated(device)
    tokens = largest_fitting(
        room,
        lambda num_tokens: packed_memory(family, reducer, num_tokens=num_tokens, num_prefix=NUM_PREFIX),
    )
    if not tokens:
        raise UserError(
            "the GPU's memory does not hold a micro batch beside the weights; choose a smaller --shape"
        )
    return tokens


def kept_bytes(language: PackedLanguage, lengths: Sequence[int], prefix: Sequence[int] = ()) -> int:
    """Count the bytes that the fast path's language model keeps for the backward pass.

    Weights don't count.

    Args:
        language: the language model.
        lengths: tokens of each example.
        prefix: ids of the shared prefix.
    """
    model: Any = language.model
    segments = Segments(lengths, language.prefixes(prefix, model.device))
    embeddings = torch.randn(
        sum(lengths),
        model.config.hidden_size,
        requires_grad=True,
        device=model.device,
        dtype=model.dtype,
    )

    # Autograd also saves weights. They are there anyway, so they don't count.
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    # Tensors that share memory count once, so keep them by address. All of them stay alive here:
    # otherwise a later tensor could get the address of an earlier one.
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    # Autograd calls `keep` for each tensor that it saves.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        language(embeddings, segments, torch.tensor([0], device=model.device))

    return sum(
        tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in weights
    )


def kept_widths(family: Family, batch: PackedBatch, prefix: Sequence[int], device: torch.device) -> float:
    """Measure how many bytes a layer of the fast path keeps for the backward pass.

    Returns:
        bytes per token in bf16, divided by the width of the model
    """
    # The difference between four layers and three leaves out what is kept outside of the layers.
    config = family.model.config.text_config
    num_bytes = []
    for num_layers in (3, 4):
        shape = type(config).from_dict(config.to_dict() | {"num_hidden_layers": num_layers})
        with torch.device(device):
            model = type(family.language_model)._from_config(shape, dtype=torch.bfloat16)
        language = PackedLanguage(model.requires_grad_(False))
        num_bytes.append(kept_bytes(language, batch.lengths, prefix))

    of_a_layer = num_bytes[1] - num_bytes[0]
    return of_a_layer / sum(batch.lengths) / config.hidden_size
