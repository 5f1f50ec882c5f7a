"""Two paths from examples to the same gradient: micro batches, and the loss that takes them.

`engine=fast` packs examples one behind the other and runs only what the gradient needs.
`engine=reference` pads them and runs everything, as stock trainers do.
"""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor

from data.batches.collate import Collator, Packer
from data.batches.dataset import Batcher, BatchPlan, MicroBatches, PackedBatcher, PaddedBatcher, has_media
from data.batches.packing import shared_prefix
from data.examples.tokens import Examples
from train.hardware import best_device
from train.losses import FastLoss, ReferenceLoss
from train.memory import LongestExamples, choose_packing, flash_runs
from train.ranks import get_rank, print_rank0
from train.trainable import Trainable
from vzip import UserError
from vzip.families import Family
from vzip.fast.fused import check_compiles
from vzip.fast.language import check_language_model


def make_batches(
    cfg: DictConfig,
    family: Family,
    trainable: Trainable,
    collators: Sequence[Collator],
    examples: Examples,
    plan: BatchPlan,
) -> tuple[MicroBatches, FastLoss | ReferenceLoss]:
    """Cut the run's steps into micro batches, and choose the loss that takes them.

    The gradients of both paths are the same.

    Args:
        cfg: the run's settings.
        family: the adapter around the model.
        trainable: the trainable parameters.
        collators: one per reducer.
        examples: the examples of the run.
        plan: its steps.

    Returns:
        (the micro batches of this rank, the loss)

    Raises:
        UserError: no example has a gradient, the fast path does not support the language model, or
            an example does not fit into memory.
    """
    has_gradient = gradient_mask(cfg, examples, tunes_language=trainable.in_language)

    batcher: Batcher
    loss: FastLoss | ReferenceLoss
    if cfg.engine == "fast":
        batcher, loss = _fast_path(cfg, family, trainable, collators, examples, plan)
    else:
        # `train.checks` allows only one budget here, so there is one collator.
        (collator,) = collators
        batcher = PaddedBatcher(collator, examples, plan, micro=cfg.batch.micro)
        loss = ReferenceLoss(family, collator.reducer, text_has_gradient=trainable.in_language)
        print_rank0(f"reference path: {batcher}")

    return MicroBatches(batcher, plan, rank=get_rank(), has_gradient=has_gradient), loss


def gradient_mask(cfg: DictConfig, examples: Examples, *, tunes_language: bool) -> Tensor:
    """Tell from which examples the trainable parameters learn: bool[examples].

    An example without a picture never reaches the projector. LoRA in the language model learns from
    every example.

    Raises:
        UserError: they learn from none.
    """
    has_gradient = has_media(examples) | tunes_language
    if not has_gradient.any():
        raise UserError(
            f"no example of data.path={cfg.data.path} has an image or a video: the projector can "
            f"learn nothing"
        )
    return has_gradient


def _fast_path(
    cfg: DictConfig,
    family: Family,
    trainable: Trainable,
    collators: Sequence[Collator],
    examples: Examples,
    plan: BatchPlan,
) -> tuple[PackedBatcher, FastLoss]:
    """Pack the examples that have a gradient, and make the loss that runs them."""
    has_gradient = gradient_mask(cfg, examples, tunes_language=trainable.in_language)

    # All examples begin with the same system prompt. It runs only once, unless LoRA is in the
    # language model: then its keys and values change with every step.
    placeholders = [family.placeholder_id(kind) for kind in collators[0].kinds]
    prefix = [] if trainable.in_language else shared_prefix(examples, placeholders)

    # One packer per reducer, because a picture has another number of tokens with each budget.
    packers = []
    for number, collator in enumerate(collators):
        packers.append(Packer(collator, num_prefix=len(prefix), reducer=number))

    # int64[reducers, examples]: the tokens of each example that run with each reducer.
    num_run = torch.stack([packer.lengths(examples) for packer in packers])
    longest = int(num_run[:, has_gradient].max())

    # Refuse early what the fast path can't compute exactly.
    check_language_model(family.model.config.get_text_config(), longest=len(prefix) + longest)

    # A micro batch holds as many tokens as fit into memory.
    lengths = LongestExamples(longest, prefix=len(prefix))
    packing = choose_packing(cfg, family, num_trainable=trainable.num_parameters, lengths=lengths)
    batcher = PackedBatcher(
        packers,
        examples,
        plan,
        tokens=packing.tokens,
        num_run=num_run,
        has_gradient=has_gradient,
    )

    loss = FastLoss(
        family,
        [collator.reducer for collator in collators],
        prefix=prefix,
        recompute=packing.recompute,
        compiled=_is_compiled(cfg),
    )

    # Say what runs. It decides the speed, and the user can't see it otherwise.
    has_flash = flash_runs(cfg, family)
    attention = "FlashAttention" if has_flash else "attention in blocks of similar length"
    print_rank0(f"fast path: {batcher}, behind a shared prefix of {len(prefix)}; {attention}")
    if packing.recompute:
        print_rank0("  to save memory, the backward pass computes the MLPs again")
    _print_left_out(has_gradient)
    return batcher, loss


def _is_compiled(cfg: DictConfig) -> bool:
    """Tell whether to use torch.compile. Raises UserError if it can't compile here."""
    # Compiling takes some seconds at the start, which only a GPU makes up for.
    device = best_device()
    compiled = bool(cfg.compile) if cfg.compile is not None else device.type == "cuda"
    if compiled:
        check_compiles(device, getattr(torch, cfg.model.dtype))
    return compiled


def _print_left_out(has_gradient: Tensor) -> None:
    """Print how many examples the fast path leaves out: those that are false in bool[examples]."""
    num_left_out = int((~has_gradient).sum())
    if num_left_out:
        print_rank0(
            f"  {num_left_out:,} examples without a picture are counted, but not run: their gradient is zero"
        )
