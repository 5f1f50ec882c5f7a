"""How many packed tokens a micro batch may hold, from the memory at hand.

Total memory is asked for, not what is free now, so that a resumed run cuts its batches as before.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import deepspeed
import torch
from omegaconf import DictConfig

from train.budgets import budgets_of
from train.config import build_reducers
from train.ranks import all_gather_list, print_rank0
from vzip import UserError
from vzip.cost import blocked_memory, generation_memory, head_width, packed_memory, weight_memory
from vzip.families import Family
from vzip.fast.attention import has_flash

LEAST, MOST, MULTIPLE = 2048, 16_384, 256
"""Tokens of a micro batch: matrix products get slower below the first, and no faster above the second."""
SPARE, CONTEXT = 0.04, 600_000_000
"""Share of the memory that is lost between tensors; bytes that CUDA and its libraries take."""
DEEPSPEED_BUCKET, DEEPSPEED_LIVE = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults: numbers of the buffer that gradients are sent from, and gathered parameters under ZeRO 3."""
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Packing:
    """What one forward of one rank holds.

    Attributes:
        tokens: at most so many packed tokens.
        recompute: whether the MLPs' activations are computed again in the backward pass.
    """

    tokens: int
    recompute: bool


@dataclass(frozen=True)
class LongestExamples:
    """Of the rows, in packed tokens.

    Attributes:
        longest: of the longest row, which is never cut.
        prefix: of what all rows begin with, which is not counted in `longest`.
    """

    longest: int
    prefix: int


@dataclass(frozen=True)
class Card:
    """Where one rank works: its bytes in all, and how they are called in a message."""

    memory: int
    name: str


def _cgroup_limits() -> Iterator[int]:
    """Bytes that this process' group, and those around it, are limited to."""
    found = Path("/proc/self/cgroup")
    lines = found.read_text().splitlines() if found.is_file() else []
    own = CGROUPS / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(CGROUPS))):
        limit = folder / "memory.max"
        if limit.is_file() and (value := limit.read_text().strip()) != "max":
            yield int(value)


def card_of(cfg: DictConfig) -> Card:
    """The card of this rank: `memory_gb` if it is given, else the GPU, else a share of half of this machine's memory."""
    if cfg.memory_gb is not None:
        return Card(int(cfg.memory_gb * 1e9), f"memory_gb={cfg.memory_gb:g}")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Card(
            device.total_memory, f"the {device.total_memory / 1e9:.1f} GB of {device.name} (memory_gb=null)"
        )
    machine = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])
    num_ranks = int(os.environ.get("LOCAL_SIZE", "1"))
    share = machine // 2 // num_ranks
    return Card(
        share,
        f"the {share / 1e9:.1f} GB that each rank has of half of this machine's memory (memory_gb=null)",
    )


def resident_memory(cfg: DictConfig, family: Family, *, num_trainable: int, world_size: int) -> int:
    """Bytes that one rank holds at all times: weights, gradients and moments of what is tuned, DeepSpeed's and CUDA's own."""
    zero = cfg.deepspeed.zero_optimization
    weights = weight_memory(family, quantize=cfg.quantize)
    tuned = 12 * num_trainable  # float32 gradients and two moments; the weights are among `weights`
    if zero.stage > 0:  # a copy of the weights, and a buffer that is made whole whatever the gradients need
        tuned += 4 * num_trainable + 4 * int(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET))
    if zero.stage == 3:
        gathered = min(weights, 2 * int(zero.get("stage3_max_live_parameters", DEEPSPEED_LIVE)))
        weights = gathered + (0 if "offload_param" in zero else weights // world_size)
    return weights + tuned + CONTEXT


def flash_runs(cfg: DictConfig, family: Family) -> bool:
    """Whether FlashAttention runs; a card that is planned for where there is no GPU (`memory_gb`) is taken for one with it."""
    if not torch.cuda.is_available():
        return cfg.memory_gb is not None
    width = head_width(family.model.config.get_text_config())
    return has_flash(torch.device("cuda"), getattr(torch, cfg.model.dtype), width)


def micro_batch_memory(cfg: DictConfig, family: Family, packing: Packing, lengths: LongestExamples) -> int:
    """Bytes that a micro batch takes beside them: of several budgets the smallest, which has the most pictures."""
    reducer = min(build_reducers(cfg), key=family.num_tile_tokens)
    size = {"num_tokens": packing.tokens, "num_prefix": lengths.prefix}
    memory = packed_memory(family, reducer, **size, recompute=packing.recompute, quantize=cfg.quantize)
    if flash_runs(cfg, family):
        return memory
    text = family.model.config.get_text_config()
    return memory + blocked_memory(text, longest=lengths.longest, num_prefix=lengths.prefix)


def _too_small(card: Card, what: str, needed: int) -> UserError:
    return UserError(
        f"{what} need {needed / (1 - SPARE) / 1e9:.1f} GB, more than {card.name}; use a larger card (hardware=80gb says what "
        f"it would hold), deepspeed=zero3 on several cards, deepspeed=zero3_offload, quantize=nf4 (quantize gradients), or "
        f"shorter rows (data.max_tokens)"
    )


def _check_room(tokens: int, longest: int) -> None:
    if tokens < longest:
        raise UserError(
            f"batch.tokens={tokens} is less than the {longest} tokens of the longest row; set at least as many, or cut "
            f"rows with data.max_tokens"
        )


def fit_packing(
    cfg: DictConfig,
    family: Family,
    card: Card,
    *,
    num_trainable: int,
    lengths: LongestExamples,
    world_size: int,
) -> Packing:
    """The largest micro batch that the card holds beside what is there at all times, and no larger than is of use.

    Raises UserError as `choose_packing` does.
    """
    resident = resident_memory(cfg, family, num_trainable=num_trainable, world_size=world_size)
    room = int(card.memory * (1 - SPARE)) - resident
    if room <= 0:
        raise _too_small(card, "weights, gradients and AdamW's moments", resident)

    def micro_batch(tokens: int, recompute: bool) -> int:
        return micro_batch_memory(cfg, family, Packing(tokens, recompute), lengths)

    given, recompute = cfg.batch.tokens, cfg.batch.recompute
    if given is not None:
        _check_room(given, lengths.longest)
        return Packing(given, recompute=micro_batch(given, False) > room if recompute is None else recompute)
    least = max(1, -(-lengths.longest // MULTIPLE)) * MULTIPLE
    sizes = range(least, max(MOST, least) + 1, MULTIPLE)
    found = []
    for way in (False, True) if recompute is None else (recompute,):
        num_fitting = bisect_right(sizes, room, key=partial(micro_batch, recompute=way))
        found.append(Packing(sizes[num_fitting - 1] if num_fitting else 0, recompute=way))
    packing = found[0] if found[0].tokens >= LEAST else found[-1]
    if (
        len(budgets_of(cfg)) > 1
    ):  # a budget is drawn for each micro batch: many, and the same ones on another machine
        packing = replace(packing, tokens=min(packing.tokens, max(LEAST, least)))
    if not packing.tokens:
        needed = resident + micro_batch(least, packing.recompute)
        raise _too_small(card, f"weights, moments and a row of {lengths.longest} tokens", needed)
    return packing


def choose_packing(
    cfg: DictConfig, family: Family, *, num_trainable: int, lengths: LongestExamples
) -> Packing:
    """The packed tokens of a micro batch: `batch.tokens` and `batch.recompute`, or what the smallest rank's memory holds.

    The MLPs are computed again only where without it fewer than 2,048 tokens, or not the longest row, would fit. Called by all
    ranks.

    Args:
        cfg: the run's settings.
        family: around the model, with its tuned parameters opened.
        num_trainable: tuned parameters.
        lengths: of the rows.

    Raises:
        UserError: the weights, or the longest row beside them, don't fit; `batch.tokens` is less than the longest row.
    """
    card = min(all_gather_list([card_of(cfg)]), key=lambda card: card.memory)
    size = {"num_trainable": num_trainable, "world_size": deepspeed.comm.get_world_size()}
    packing = fit_packing(cfg, family, card, lengths=lengths, **size)
    needed = resident_memory(cfg, family, **size) + micro_batch_memory(cfg, family, packing, lengths)
    if needed > card.memory:
        print_rank0(
            f"batch.tokens={packing.tokens} is reckoned to need {needed / 1e9:.1f} GB, more than {card.name}"
        )
    return packing


def fitting_questions(
    cfg: DictConfig, family: Family, *, longest: int, num_trainable: int, world_size: int
) -> int:
    """The questions of one generate call: `evaluate.batch`, or as many as the smallest rank's memory holds.

    Called by all ranks.

    Args:
        cfg: the run's settings.
        family: around the model.
        longest: tokens of the longest question, with its answer.
        num_trainable: tuned parameters.
        world_size: ranks.
    """
    card = min(all_gather_list([card_of(cfg)]), key=lambda card: card.memory)
    resident = resident_memory(cfg, family, num_trainable=num_trainable, world_size=world_size)
    room = int(card.memory * (1 - SPARE)) - resident
    fitting = max(1, room // generation_memory(family, num_tokens=longest))
    if fitting < cfg.evaluate.batch:
        print_rank0(
            f"{fitting} questions of up to {longest} tokens at once, and not evaluate.batch={cfg.evaluate.batch}: {card.name}"
        )
    return int(min(fitting, cfg.evaluate.batch))
