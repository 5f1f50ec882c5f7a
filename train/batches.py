"""The two ways from a run's rows to the gradient: how they are laid out in micro batches, and the loss that takes these."""

from collections.abc import Sequence

import deepspeed
import torch
from omegaconf import DictConfig

from data.batches.collate import Collator, Packer
from data.batches.dataset import BatchPlan, MicroBatches, PackedBatcher, PaddedBatcher, has_media
from data.batches.packing import shared_prefix
from data.examples.tokens import Examples
from train.losses import FastLoss, ReferenceLoss
from train.memory import LongestExamples, choose_packing, flash_runs
from train.ranks import print_rank0
from train.trainable import Trainable
from vzip import UserError
from vzip.families import Family
from vzip.fast.fused import check_compiles
from vzip.fast.language import check_language_model


def _fast(
    cfg: DictConfig,
    family: Family,
    trainable: Trainable,
    collators: Sequence[Collator],
    examples: Examples,
    plan: BatchPlan,
) -> tuple[PackedBatcher, FastLoss]:
    """Packed. Rows without a picture, and the prefix of the others, are left out where only a projector learns."""
    placeholders = [family.placeholder_id(kind) for kind in collators[0].kinds]
    prefix = [] if trainable.in_language else shared_prefix(examples, placeholders)
    packers = [
        Packer(collate, num_prefix=len(prefix), reducer=number) for number, collate in enumerate(collators)
    ]
    has_gradient = has_media(examples) | trainable.in_language
    num_run = torch.stack([packer.lengths(examples) for packer in packers])
    longest = int(num_run[:, has_gradient].max())
    check_language_model(family.model.config.get_text_config(), longest=len(prefix) + longest)
    lengths = LongestExamples(longest, prefix=len(prefix))
    packing = choose_packing(cfg, family, num_trainable=trainable.num_parameters, lengths=lengths)
    batcher = PackedBatcher(
        packers, examples, plan, num_run=num_run, has_gradient=has_gradient, tokens=packing.tokens
    )
    attention = "FlashAttention" if flash_runs(cfg, family) else "attention in blocks of rows of like length"
    print_rank0(f"fast path: {batcher}, behind a shared prefix of {len(prefix)}; {attention}")
    if packing.recompute:
        print_rank0("  to save memory, the MLPs are run again in the backward pass")
    if not_run := int((~has_gradient).sum()):
        print_rank0(f"  {not_run:,} rows without a picture are counted, but not run: their gradient is zero")
    reducers, on_gpu = [each.reducer for each in collators], torch.cuda.is_available()
    if compiled := on_gpu if cfg.compile is None else cfg.compile:
        check_compiles(torch.device("cuda" if on_gpu else "cpu"), getattr(torch, cfg.model.dtype))
    return batcher, FastLoss(family, reducers, prefix=prefix, recompute=packing.recompute, compiled=compiled)


def _reference(
    cfg: DictConfig,
    family: Family,
    trainable: Trainable,
    collators: Sequence[Collator],
    examples: Examples,
    plan: BatchPlan,
) -> tuple[PaddedBatcher, ReferenceLoss]:
    """Padded, all rows."""
    batcher = PaddedBatcher(collators[0], examples, plan, micro=cfg.batch.micro)
    print_rank0(f"reference path: {batcher}")
    return batcher, ReferenceLoss(family, collators[0].reducer, text_has_gradient=trainable.in_language)


WAYS = {"fast": _fast, "reference": _reference}


def make_batches(
    cfg: DictConfig,
    family: Family,
    trainable: Trainable,
    collators: Sequence[Collator],
    examples: Examples,
    plan: BatchPlan,
) -> tuple[MicroBatches, FastLoss | ReferenceLoss]:
    """(this rank's micro batches, their loss) of `engine=fast` or `engine=reference`, whose gradients are the same.

    Args:
        cfg: the run's settings.
        family: around the model.
        trainable: what is tuned.
        collators: one a reducer.
        examples: the rows of the run.
        plan: its steps.

    Raises:
        UserError: nothing to learn from, a language model that the fast path does not take, or a row that the memory does not.
    """
    has_gradient = has_media(examples) | trainable.in_language
    if not has_gradient.any():
        raise UserError(
            f"no row of data.path={cfg.data.path} has an image or a video: the projector can learn nothing"
        )
    batcher, loss = WAYS[cfg.engine](cfg, family, trainable, collators, examples, plan)
    return MicroBatches(batcher, plan, rank=deepspeed.comm.get_rank(), has_gradient=has_gradient), loss
