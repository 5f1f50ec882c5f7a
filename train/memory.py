"""How many packed tokens a micro batch may hold, estimated from the memory of the card.

The estimate starts from the total memory, not from what is free now, so that a resumed run cuts its
batches as before.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from train.config import budgets_of, build_reducers
from train.ranks import all_gather_list, get_world_size, print_rank0
from vzip import UserError
from vzip.cost import blocked_memory, generation_memory, head_width, packed_memory, weight_memory
from vzip.families import Family
from vzip.fast.attention import has_flash

# Tokens of a micro batch below which matrix products get slower.
MIN_TOKENS = 2048

# Tokens of a micro batch above which matrix products get no faster.
MAX_TOKENS = 16_384

# Micro batches are planned in multiples of so many tokens.
MULTIPLE = 256

# Share of the memory that is lost between tensors.
LOST_SHARE = 0.04

# Bytes that CUDA and its libraries take.
CUDA_CONTEXT = 600_000_000

# DeepSpeed's default size of the buffer that gradients are sent from, in numbers.
DEEPSPEED_BUCKET = 500_000_000

# DeepSpeed's default limit of gathered parameters under ZeRO 3.
DEEPSPEED_LIVE = 1_000_000_000

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Packing:
    """The size of micro batches.

    Attributes:
        tokens: the most packed tokens of one forward on one rank.
        recompute: whether the backward pass computes the activations of the MLPs again.
    """

    tokens: int
    recompute: bool


@dataclass(frozen=True)
class LongestExamples:
    """Lengths of the examples, in packed tokens.

    Attributes:
        longest: tokens of the longest example, which is never cut, without the shared prefix.
        prefix: tokens of the prefix that all examples share.
    """

    longest: int
    prefix: int


@dataclass(frozen=True)
class Card:
    """The memory that one rank has: of a GPU, or its share of the machine's.

    Attributes:
        memory: bytes in total.
        name: how messages call it.
    """

    memory: int
    name: str

    @property
    def usable(self) -> int:
        """Bytes that tensors can fill."""
        return int(self.memory * (1 - LOST_SHARE))


def card_of(cfg: DictConfig) -> Card:
    """The card of this rank: `memory_gb`, the GPU, or a share of half of the machine's memory."""
    if cfg.memory_gb is not None:
        return Card(int(cfg.memory_gb * 1e9), f"memory_gb={cfg.memory_gb:g}")

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        name = f"the {gpu.total_memory / 1e9:.1f} GB of {gpu.name} (memory_gb=null)"
        return Card(gpu.total_memory, name)

    # On a CPU, half of the memory is left to other programs, and the ranks share the rest.
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    num_ranks = int(os.environ.get("LOCAL_SIZE", "1"))
    share = min([machine, *_cgroup_limits()]) // 2 // num_ranks
    of_what = "that each rank has of half of this machine's memory (memory_gb=null)"
    return Card(share, f"the {share / 1e9:.1f} GB {of_what}")


def _cgroup_limits() -> Iterator[int]:
    """The memory limits in bytes of this process' control groups, which containers set."""
    # The line of version 2 of control groups begins with "0::".
    own_group = ""
    listing = Path("/proc/self/cgroup")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("0::/"):
                own_group = line.removeprefix("0::/")

    # A group is also bound by the limits of those around it.
    folder = CGROUPS / own_group
    while folder.is_relative_to(CGROUPS):
        limit = folder / "memory.max"
        if limit.is_file():
            value = limit.read_text().strip()
            if value != "max":
                yield int(value)
        folder = folder.parent


def smallest_card(cfg: DictConfig) -> Card:
    """The card of the rank that has the least memory. Called by all ranks."""
    return min(all_gather_list([card_of(cfg)]), key=lambda card: card.memory)


def resident_memory(cfg: DictConfig, family: Family, *, num_trainable: int, world_size: int) -> int:
    """Bytes that one rank holds at all times: weights, gradients, moments, DeepSpeed's and CUDA's.

    Args:
        cfg: the run's settings.
        family: the adapter around the model.
        num_trainable: trainable parameters.
        world_size: ranks, which share the weights under ZeRO 3.
    """
    zero = cfg.deepspeed.zero_optimization
    weights = weight_memory(family, quantize=cfg.quantize)

    # Gradients and two moments in float32. The trainable parameters themselves are among the
    # weights.
    training = 12 * num_trainable

    # ZeRO keeps a copy of the trainable parameters, and a buffer whose size does not depend on the
    # gradients.
    if zero.stage > 0:
        bucket = int(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET))
        training += 4 * num_trainable + 4 * bucket

    # ZeRO 3 shares the weights over the ranks, or moves them to the host, and gathers some of them
    # at a time.
    if zero.stage == 3:
        own_share = 0 if "offload_param" in zero else weights // world_size
        most_gathered = 2 * int(zero.get("stage3_max_live_parameters", DEEPSPEED_LIVE))
        weights = own_share + min(weights, most_gathered)

    return weights + training + CUDA_CONTEXT


def flash_runs(cfg: DictConfig, family: Family) -> bool:
    """Whether FlashAttention runs.

    Without a GPU, `memory_gb` plans for a card elsewhere, and is taken to mean one that has it.
    """
    if not torch.cuda.is_available():
        return cfg.memory_gb is not None

    width = head_width(family.model.config.get_text_config())
    return has_flash(torch.device("cuda"), getattr(torch, cfg.model.dtype), width)


def micro_batch_memory(cfg: DictConfig, family: Family, packing: Packing, lengths: LongestExamples) -> int:
    """Bytes that a packed micro batch takes beside `resident_memory`.

    With several budgets it is that of the smallest one, whose micro batches hold the most pictures.
    """
    reducer = min(build_reducers(cfg), key=family.num_tile_tokens)
    memory = packed_memory(
        family,
        reducer,
        num_tokens=packing.tokens,
        num_prefix=lengths.prefix,
        recompute=packing.recompute,
        quantize=cfg.quantize,
    )
    if flash_runs(cfg, family):
        return memory

    # Without FlashAttention, the scores of a block of examples take memory too.
    text = family.model.config.get_text_config()
    return memory + blocked_memory(text, longest=lengths.longest, num_prefix=lengths.prefix)


def largest_fitting(room: int, memory_of: Callable[[int], int], *, smallest: int = MULTIPLE) -> int:
    """The largest size of a micro batch that fits, in tokens; 0 if none does.

    Args:
        room: bytes for the micro batch.
        memory_of: bytes that a micro batch of so many tokens takes.
        smallest: the least tokens to try. Other sizes are larger by multiples of 256, up to 16,384.
    """
    sizes = range(smallest, max(MAX_TOKENS, smallest) + 1, MULTIPLE)
    num_fitting = bisect_right(sizes, room, key=memory_of)
    return sizes[num_fitting - 1] if num_fitting else 0


def fit_packing(
    cfg: DictConfig,
    family: Family,
    card: Card,
    *,
    num_trainable: int,
    lengths: LongestExamples,
    world_size: int,
) -> Packing:
    """The largest micro batch that a card holds, but none that is larger than useful.

    Raises:
        UserError: as `choose_packing` does.
    """
    resident = resident_memory(cfg, family, num_trainable=num_trainable, world_size=world_size)
    room = card.usable - resident
    if room <= 0:
        raise _card_too_small(card, "weights, gradients and AdamW's moments", resident)

    def memory_of(tokens: int, *, recompute: bool) -> int:
        return micro_batch_memory(cfg, family, Packing(tokens, recompute), lengths)

    # Settings of the user are taken as they are.
    tokens = cfg.batch.tokens
    recompute = cfg.batch.recompute
    if tokens is not None:
        _check_longest_example(tokens, lengths.longest)
        if recompute is None:
            recompute = memory_of(tokens, recompute=False) > room
        return Packing(tokens, recompute)

    # An example is never cut: the micro batch must hold the longest one.
    smallest = max(1, -(-lengths.longest // MULTIPLE)) * MULTIPLE

    def largest(*, recompute: bool) -> Packing:
        fitting = largest_fitting(room, partial(memory_of, recompute=recompute), smallest=smallest)
        return Packing(fitting, recompute)

    # Recompute only if the micro batch would be too small otherwise.
    packing = largest(recompute=bool(recompute))
    if recompute is None and packing.tokens < MIN_TOKENS:
        packing = largest(recompute=True)

    # Not even the longest example alone fits.
    if not packing.tokens:
        needed = resident + memory_of(smallest, recompute=packing.recompute)
        what = f"weights, moments and an example of {lengths.longest} tokens"
        raise _card_too_small(card, what, needed)

    # Each micro batch draws one of several budgets: cut many of them, and the same ones on every
    # machine.
    if len(budgets_of(cfg)) > 1:
        packing = replace(packing, tokens=min(packing.tokens, max(MIN_TOKENS, smallest)))
    return packing


def _card_too_small(card: Card, what: str, needed: int) -> UserError:
    gigabytes = needed / (1 - LOST_SHARE) / 1e9
    return UserError(
        f"{what} need {gigabytes:.1f} GB, more than {card.name}; use a larger card (hardware=80gb "
        f"shows what it would hold), deepspeed=zero3 on several cards, deepspeed=zero3_offload, "
        f"quantize=nf4 (gradients are no longer exact), or shorter examples (data.max_tokens)"
    )


def _check_longest_example(tokens: int, longest: int) -> None:
    if tokens < longest:
        raise UserError(
            f"batch.tokens={tokens} is less than the {longest} tokens of the longest example; set at "
            f"least as many, or cut examples with data.max_tokens"
        )


def choose_packing(
    cfg: DictConfig, family: Family, *, num_trainable: int, lengths: LongestExamples
) -> Packing:
    """The size of micro batches: the settings in `batch`, or the largest that all ranks can hold.

    MLPs are recomputed only when memory is short: when fewer than 2,048 tokens, or the longest
    example, would not fit. Called by all ranks.

    Args:
        cfg: the run's settings.
        family: the adapter around the model, with its trainable parameters in float32.
        num_trainable: trainable parameters.
        lengths: lengths of the examples.

    Raises:
        UserError: the weights, or the longest example beside them, do not fit; or `batch.tokens` is
            less than the longest example.
    """
    card = smallest_card(cfg)
    world_size = get_world_size()
    packing = fit_packing(
        cfg, family, card, num_trainable=num_trainable, lengths=lengths, world_size=world_size
    )

    # A setting of the user is taken as it is, with a warning if it seems too large.
    needed = resident_memory(cfg, family, num_trainable=num_trainable, world_size=world_size)
    needed += micro_batch_memory(cfg, family, packing, lengths)
    if needed > card.memory:
        print_rank0(
            f"batch.tokens={packing.tokens} is estimated to need {needed / 1e9:.1f} GB, more than {card.name}"
        )
    return packing


def fitting_questions(
    cfg: DictConfig, family: Family, *, longest: int, num_trainable: int, world_size: int
) -> int:
    """The questions of one `generate` call: `evaluate.batch`, or as many as the memory holds.

    Called by all ranks.

    Args:
        cfg: the run's settings.
        family: the adapter around the model.
        longest: tokens of the longest question, with its answer.
        num_trainable: trainable parameters.
        world_size: ranks.
    """
    card = smallest_card(cfg)
    resident = resident_memory(cfg, family, num_trainable=num_trainable, world_size=world_size)
    room = card.usable - resident

    # A single question is tried in any case.
    num_fitting = max(1, room // generation_memory(family, num_tokens=longest))
    if num_fitting < cfg.evaluate.batch:
        print_rank0(
            f"{num_fitting} questions of up to {longest} tokens at once, not "
            f"evaluate.batch={cfg.evaluate.batch}: {card.name}"
        )
    return int(min(num_fitting, cfg.evaluate.batch))
