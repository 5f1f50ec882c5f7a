"""How many packed tokens a micro batch may hold, estimated from the memory of the card.

The estimate starts from the total memory, not from what is free now, so that a resumed run cuts its
batches as before.
"""

import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from omegaconf import DictConfig

from data.cgroups import memory_limits
from train.config import budgets_of, build_reducers
from train.ranks import all_gather_list, get_world_size, num_local_ranks, print_rank0
from vzip import UserError
from vzip.cost import blocked_memory, generation_memory, head_width, packed_memory, weight_memory
from vzip.families import Family
from vzip.fast.attention import has_flash

# With fewer tokens in a micro batch, matrix products get slower.
MIN_TOKENS = 2048

# With more tokens in a micro batch, matrix products get no faster.
MAX_TOKENS = 16_384

# Micro batches are planned in multiples of this many tokens.
MULTIPLE = 256

# Share of the memory that is lost in gaps between tensors.
LOST_SHARE = 0.04

# Bytes that CUDA and its libraries take.
CUDA_CONTEXT = 600_000_000

# DeepSpeed's default size of the buffer that gradients are sent from, in numbers.
DEEPSPEED_BUCKET = 500_000_000

# DeepSpeed's default limit of gathered parameters under ZeRO 3.
DEEPSPEED_LIVE = 1_000_000_000


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
    """Return this rank's card: `memory_gb`, the GPU, or a share of half of the machine's memory."""
    # The user's number wins: it can plan for a card that is not here.
    if cfg.memory_gb is not None:
        return Card(int(cfg.memory_gb * 1e9), f"memory_gb={cfg.memory_gb:g}")

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        name = f"the {gpu.total_memory / 1e9:.1f} GB of {gpu.name} (memory_gb=null)"
        return Card(gpu.total_memory, name)

    # On a CPU, half of the memory is left to other programs, and the ranks share the rest. In a
    # container the machine has more memory than the process may use, so the lower limit counts.
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = min([machine, *memory_limits()]) // 2 // num_local_ranks()
    of_what = "that each rank has of half of the memory of this machine or container (memory_gb=null)"
    return Card(share, f"the {share / 1e9:.1f} GB {of_what}")


def smallest_card(cfg: DictConfig) -> Card:
    """Return the card of the rank that has the least memory. Called by all ranks."""
    # All ranks must plan the same micro batches, so the smallest card decides.
    return min(all_gather_list([card_of(cfg)]), key=lambda card: card.memory)


def resident_memory(cfg: DictConfig, family: Family, *, num_trainable: int, world_size: int) -> int:
    """Estimate the bytes that one rank holds at all times.

    Weights, gradients and moments take them, with the buffers of DeepSpeed and of CUDA.

    Args:
        cfg: the run's settings.
        family: the adapter around the model.
        num_trainable: trainable parameters.
        world_size: ranks, which share the weights under ZeRO 3.
    """
    zero = cfg.deepspeed.zero_optimization
    weights = weight_memory(family, quantize=cfg.quantize)

    # Gradients and two moments in float32, 4 bytes each. The trainable parameters themselves are
    # among the weights.
    training = 12 * num_trainable

    # ZeRO keeps a copy of the trainable parameters, and a buffer of a fixed size.
    if zero.stage > 0:
        bucket = int(zero.get("reduce_bucket_size", DEEPSPEED_BUCKET))
        training += 4 * num_trainable + 4 * bucket

    # ZeRO 3 shares the weights over the ranks, or moves them to the host. It gathers some of them
    # at a time, at 2 bytes each.
    if zero.stage == 3:
        own_share = 0 if "offload_param" in zero else weights // world_size
        most_gathered = 2 * int(zero.get("stage3_max_live_parameters", DEEPSPEED_LIVE))
        weights = own_share + min(weights, most_gathered)

    return weights + training + CUDA_CONTEXT


def flash_runs(cfg: DictConfig, family: Family) -> bool:
    """Tell whether FlashAttention runs."""
    # Without a GPU, `memory_gb` plans for a card elsewhere, which probably has FlashAttention.
    if not torch.cuda.is_available():
        return cfg.memory_gb is not None

    width = head_width(family.model.config.get_text_config())
    return has_flash(torch.device("cuda"), getattr(torch, cfg.model.dtype), width)


def micro_batch_memory(cfg: DictConfig, family: Family, packing: Packing, lengths: LongestExamples) -> int:
    """Estimate the bytes that a packed micro batch takes on top of `resident_memory`."""
    # The smallest of several budgets takes the most: its micro batches hold the most pictures.
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
    """Find the largest size of a micro batch that fits, in tokens; 0 if none does.

    Args:
        room: bytes for the micro batch.
        memory_of: returns the bytes that a micro batch of some tokens takes.
        smallest: the least tokens to try. Other sizes are larger by multiples of 256, up to 16,384.
    """
    # The memory grows with the size, so that a binary search finds the last size that fits.
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
    """Choose the largest micro batch that a card holds, but not more tokens than make it faster.

    Raises:
        UserError: see `choose_packing`.
    """
    # What the weights leave free is for the micro batch.
    resident = resident_memory(cfg, family, num_trainable=num_trainable, world_size=world_size)
    room = card.usable - resident
    if room <= 0:
        raise _card_too_small(card, "weights, gradients and AdamW's moments", resident)

    def memory_of(tokens: int, *, recompute: bool) -> int:
        return micro_batch_memory(cfg, family, Packing(tokens, recompute), lengths)

    # The user's own number of tokens is used even if it seems too large: this is an estimate.
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

    # Nothing fits: say how much memory the longest example needs.
    if not packing.tokens:
        needed = resident + memory_of(smallest, recompute=packing.recompute)
        what = f"weights, moments and an example of {lengths.longest} tokens"
        raise _card_too_small(card, what, needed)

    # With several budgets, each micro batch draws one. Small micro batches draw often, and a size
    # that does not depend on the memory draws the same budgets on every machine.
    if len(budgets_of(cfg)) > 1:
        packing = replace(packing, tokens=min(packing.tokens, max(MIN_TOKENS, smallest)))
    return packing


def _card_too_small(card: Card, what: str, needed: int) -> UserError:
    """Make the error about a card that can't hold something. `needed` is its size in bytes."""
    # A card of this size would hold it, with the share that is lost between tensors.
    gigabytes = needed / (1 - LOST_SHARE) / 1e9
    return UserError(
        f"{what} need {gigabytes:.1f} GB, more than {card.name}; use a larger card (hardware=80gb "
        f"shows what it would hold), deepspeed=zero3 on several cards, deepspeed=zero3_offload, "
        f"quantize=nf4 (gradients are no longer exact), or shorter examples (data.max_tokens)"
    )


def _check_longest_example(tokens: int, longest: int) -> None:
    """Raise UserError if a micro batch can't hold the longest example, which is never cut."""
    if tokens < longest:
        raise UserError(
            f"batch.tokens={tokens} is less than the {longest} tokens of the longest example; set at "
            f"least as many, or cut examples with data.max_tokens"
        )


def choose_packing(
    cfg: DictConfig, family: Family, *, num_trainable: int, lengths: LongestExamples
) -> Packing:
    """Choose the size of micro batches: the settings in `batch`, or the largest that fits.

    It fits if all ranks can hold it. MLPs are recomputed only when memory is short: when 2,048
    tokens, or the longest example, would not fit otherwise. Called by all ranks.

    Args:
        cfg: the run's settings.
        family: the adapter around the model, with its trainable parameters in float32.
        num_trainable: trainable parameters.
        lengths: lengths of the examples.

    Raises:
        UserError: the weights, or the longest example on top of them, do not fit, or `batch.tokens`
            is less than the longest example.
    """
    card = smallest_card(cfg)
    world_size = get_world_size()
    packing = fit_packing(
        cfg, family, card, num_trainable=num_trainable, lengths=lengths, world_size=world_size
    )

    # Only the user's own number of tokens can be too large here. Warn, because it may still fit.
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
    """Choose how many questions one `generate` call takes: at most `evaluate.batch`.

    It takes fewer if the memory holds no more.

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

    # Try a single question in any case: this is an estimate.
    num_fitting = max(1, room // generation_memory(family, num_tokens=longest))
    if num_fitting < cfg.evaluate.batch:
        print_rank0(
            f"{num_fitting} questions of up to {longest} tokens at once, not "
            f"evaluate.batch={cfg.evaluate.batch}: {card.name}"
        )
    return int(min(num_fitting, cfg.evaluate.batch))
