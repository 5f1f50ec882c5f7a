"""The dry run: what a run would do and cost, without weights, data or a GPU."""

import math
import time

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from train.config import asks_questions, batch_plan, build_reducer, build_reducers
from train.hardware import best_device
from train.memory import LongestExamples, card_of, fit_packing, micro_batch_memory, resident_memory
from train.models import count_model
from train.trainable import make_trainable, print_trainable
from vzip import UserError
from vzip.cost import ExampleCost, example_cost, padded_memory, weight_memory
from vzip.families import Family
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity
from vzip.runs.projector import budget_of

# Dense bf16 FLOP/s of an H100 SXM.
H100_PEAK = 989e12

# The share of a device's peak that the time estimate assumes.
MFU = 0.4

# (height, width) of a typical picture, if the settings of the data give no size.
COCO_SIZE = (480, 640)

# The plan assumes that all examples share this many first tokens, like Vicuna's system prompt.
NUM_PREFIX = 40

# The plan shows images of at most this many different numbers of tiles.
MAX_SIZES = 5


def print_plan(cfg: DictConfig, *, world_size: int) -> None:
    """Print what a run trains, its visual tokens, steps, FLOPs, memory and time."""
    # Build everything that the run would build, but without weights: so the checks are the same.
    family = count_model(cfg)
    reducers = build_reducers(cfg)
    reducer = build_reducer(cfg)
    family.check_reducer(reducer)
    trainable = make_trainable(family, cfg.tune)
    print_trainable(family, trainable)

    # Every estimate is for a typical example of the data.
    num_pictures, num_visual_tokens = _typical_example(family, cfg, reducer)
    cost = example_cost(
        family,
        reducer,
        num_tiles=num_pictures,
        num_visual_tokens=num_visual_tokens,
        num_text_tokens=cfg.data.expected.text_tokens,
    )

    # With a feature cache and no questions, a run frees the towers, so their memory does not count.
    if cfg.data.cache and not asks_questions(cfg):
        family.drop_towers()
    memory = _memory_lines(
        cfg,
        family,
        num_trainable=trainable.num_parameters,
        num_visual_tokens=num_visual_tokens,
        world_size=world_size,
    )

    # The lines of the table, in the order in which a reader asks: what, how much, how long.
    reducer_names = "; ".join(repr(each) for each in reducers)
    if len(reducers) > 1:
        reducer_names += "; the plan is for the largest"
    lines = {
        "model": f"{cfg.model.name} ({cfg.model.id}, weights={cfg.weights})",
        "reducer": reducer_names,
        **_token_lines(family, cfg, reducer),
        **_step_lines(cfg, cost, world_size=world_size),
        **memory,
        **_time_lines(cfg, cost, world_size=world_size),
    }

    table = Table(show_header=False, title="plan", title_justify="left")
    for name, value in lines.items():
        table.add_row(name, value)
    Console().print(table)


def _typical_example(family: Family, cfg: DictConfig, reducer: Reducer) -> tuple[int, int]:
    """Return (pictures that the tower sees, visual tokens) of a typical example of the data."""
    # The tower sees the frames of a video one by one, and the tiles of an image.
    expected = cfg.data.expected
    if expected.get("media", "image") == "video":
        num_frames = cfg.model.get("num_frames", 1)
        return num_frames, family.num_video_tokens(reducer, num_frames)

    size = tuple(expected.get("image_size", COCO_SIZE))
    return family.num_tiles(size), family.num_image_tokens(reducer, size)


def _token_lines(family: Family, cfg: DictConfig, reducer: Reducer) -> dict[str, str]:
    """Show what the budget means: tokens of images with few and many tiles, and of a video."""
    # Sizes with the same number of tiles have similar numbers of tokens, so show one of them.
    full = Identity()
    size_by_tiles = {family.num_tiles(size): size for size in family.image_sizes}
    numbers = sorted(size_by_tiles)
    if len(numbers) > MAX_SIZES:
        # Show some of them at even distances, with the smallest and the largest.
        step = (len(numbers) - 1) / (MAX_SIZES - 1)
        numbers = [numbers[round(index * step)] for index in range(MAX_SIZES)]

    lines = {}
    for num_tiles in numbers:
        height, width = size_by_tiles[num_tiles]
        before = family.num_image_tokens(full, (height, width))
        after = family.num_image_tokens(reducer, (height, width))
        counts = f"{before:,} before, {after:,} after"
        if len(size_by_tiles) == 1:
            lines["tokens an image"] = counts
        else:
            lines[f"image of {num_tiles} tiles"] = f"{counts} ({height} x {width} px)"

    # For a family that cuts images into tiles, say how the budget is shared.
    if family.budget_tiles > 1 and cfg.reducer.get("budget") is not None:
        more = "; row ends come on top" if family.anyres == "spatial" else ""
        lines["budget"] = (
            f"{budget_of(family, reducer)} is the total of {family.budget_tiles} tiles: "
            f"{family.num_tile_tokens(reducer)} each; an image of fewer tiles has fewer tokens{more}"
        )

    if "video" in family.kinds:
        num_frames = cfg.model.num_frames
        before = family.num_video_tokens(full, num_frames)
        after = family.num_video_tokens(reducer, num_frames)
        lines[f"video of {num_frames} frames"] = f"{before:,} before, {after:,} after"
    return lines


def _step_lines(cfg: DictConfig, cost: ExampleCost, *, world_size: int) -> dict[str, str]:
    """Show the data, the steps, and the FLOPs of the run."""
    expected = cfg.data.expected
    num_examples = _num_examples(cfg)
    plan = batch_plan(cfg, num_examples=num_examples, world_size=world_size)
    petaflops = _flops(cfg, cost, world_size=world_size) / 1e15
    stages = (
        f"tower {cost.tower / 1e9:,.0f}, projector {cost.projector / 1e9:,.1f}, "
        f"language {cost.language / 1e9:,.0f} GFLOP"
    )
    return {
        "examples": (
            f"{num_examples:,} = {cfg.data.fraction:g} of {expected.rows:,}, with "
            f"{expected.text_tokens} text tokens each (estimated)"
        ),
        "batches": str(plan),
        "compute": (
            f"{petaflops:,.1f} PFLOP for all tokens, of which engine=fast runs fewer; an example: {stages}"
        ),
    }


def _num_examples(cfg: DictConfig) -> int:
    """Estimate the examples of the run, without its data."""
    return round(cfg.data.expected.rows * cfg.data.fraction)


def _flops(cfg: DictConfig, cost: ExampleCost, *, world_size: int) -> int:
    """Count the FLOPs of the whole run, at a typical example's cost."""
    plan = batch_plan(cfg, num_examples=_num_examples(cfg), world_size=world_size)
    return cost.total * plan.size * plan.num_steps


def _memory_lines(
    cfg: DictConfig, family: Family, *, num_trainable: int, num_visual_tokens: int, world_size: int
) -> dict[str, str]:
    """Show the micro batch of one rank and the memory that it takes, or why none fits.

    Args:
        cfg: the run's settings.
        family: the adapter around the model.
        num_trainable: trainable parameters.
        num_visual_tokens: visual tokens of a typical example.
        world_size: ranks.
    """
    # Start with the memory that is always taken. A micro batch comes on top.
    expected = cfg.data.expected
    card = card_of(cfg)
    memory = resident_memory(cfg, family, num_trainable=num_trainable, world_size=world_size)
    if cfg.engine == "reference":
        micro_batch = f"{cfg.batch.micro} examples, padded, layers checkpointed"
        num_tokens = cfg.batch.micro * (num_visual_tokens + expected.text_tokens)
        memory += padded_memory(family, num_tokens=num_tokens)
    else:
        longest = num_visual_tokens + min(expected.longest, cfg.data.max_tokens)
        lengths = LongestExamples(longest, NUM_PREFIX)
        # The plan says why nothing fits, and still shows everything else.
        try:
            packing = fit_packing(
                cfg, family, card, num_trainable=num_trainable, lengths=lengths, world_size=world_size
            )
        except UserError as error:
            return {"a micro batch": f"none: {error}"}

        how = "nothing computed twice"
        if packing.recompute:
            how = "the backward pass computes the MLPs again"
        micro_batch = f"up to {packing.tokens:,} packed tokens, {how}"
        memory += micro_batch_memory(cfg, family, packing, lengths)

    weights = weight_memory(family, quantize=cfg.quantize)
    total = f"{memory / 1e9:,.1f} GB, of {card.name}; all weights {weights / 1e9:,.1f} GB"
    if cfg.quantize:
        total += f", the language model in {cfg.quantize}: gradients are not exact"
    return {"a micro batch": micro_batch, "memory a rank": total}


def _time_lines(cfg: DictConfig, cost: ExampleCost, *, world_size: int) -> dict[str, str]:
    """Estimate how long the run takes on an H100, and on this machine."""
    flops = _flops(cfg, cost, world_size=world_size)
    on_h100 = flops / H100_PEAK / MFU
    here = flops / _measured_peak() / MFU / world_size
    return {
        "time on one H100": f"{_duration(on_h100)} at {MFU:.0%} of its peak",
        "time here": f"{_duration(here)} at {MFU:.0%} of the measured peak",
    }


def _measured_peak() -> float:
    """Measure the FLOP/s of a bf16 matrix product on this machine."""
    # Large enough to keep the device busy. A CPU is slower, so it gets a smaller one.
    device = best_device()
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    # Take the fastest of five, because other programs slow some of them down.
    fastest = math.inf
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _duration(seconds: float) -> str:
    """Write seconds in the largest unit of which there are at least two: "2.5 hours"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
