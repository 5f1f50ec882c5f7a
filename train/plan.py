"""The dry run: what a run would do and cost, without weights, data or a GPU."""

import math
import time

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from train.config import asks_questions, batch_plan, build_reducer, build_reducers
from train.memory import LongestExamples, card_of, fit_packing, micro_batch_memory, resident_memory
from train.models import count_model
from train.trainable import make_trainable, print_trainable
from vzip import UserError
from vzip.cost import example_cost, padded_memory, weight_memory
from vzip.families import Family
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity
from vzip.runs.projector import budget_of

H100_PEAK, MFU = 989e12, 0.4
"""bf16 FLOP/s of an H100 SXM, and the share of a device's peak that the estimate counts on."""
COCO_SIZE = (480, 640)
"""(height, width) of a typical picture, where the data's settings name none."""
NUM_PREFIX = 40
"""Text tokens that all rows begin with, much as Vicuna's system prompt takes."""
MAX_SIZES = 5
"""Numbers of tiles that the plan shows."""


def measured_peak() -> float:
    """FLOP/s of a bf16 matrix product on this machine, by a short measurement."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, fastest = (8192 if device == "cuda" else 1024), math.inf
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(5):  # the best of some, as other programs take time too
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _visual(family: Family, cfg: DictConfig, reducer: Reducer) -> tuple[int, int]:
    """(pictures that the tower sees, visual tokens) of a typical row of the data."""
    expected = cfg.data.expected
    if expected.get("media", "image") == "video":
        num_frames = cfg.model.get("num_frames", 1)
        return num_frames, family.num_video_tokens(reducer, num_frames)
    size = tuple(expected.get("image_size", COCO_SIZE))
    return family.num_tiles(size), family.num_image_tokens(reducer, size)


def _token_rows(family: Family, cfg: DictConfig, reducer: Reducer) -> dict[str, str]:
    """What the budget means: tokens of an image of each number of tiles, and of a video, before and after."""
    rows, full = {}, Identity()
    by_tiles = {family.num_tiles(size): size for size in family.image_sizes}
    shown = sorted(by_tiles.items())
    if len(shown) > MAX_SIZES:
        shown = [shown[round(index * (len(shown) - 1) / (MAX_SIZES - 1))] for index in range(MAX_SIZES)]
    for num_tiles, size in shown:
        before, after = family.num_image_tokens(full, size), family.num_image_tokens(reducer, size)
        name = "tokens an image" if len(by_tiles) == 1 else f"image of {num_tiles} tiles"
        rows[name] = f"{before:,} before, {after:,} after" + (
            f" ({size[0]} x {size[1]} px)" if len(by_tiles) > 1 else ""
        )
    if family.budget_tiles > 1 and "budget" in cfg.reducer and cfg.reducer.budget is not None:
        more = "; row ends come on top" if reducer.anyres == "spatial" else ""
        rows["budget"] = (
            f"{budget_of(family, reducer)} is the total of {family.budget_tiles} tiles: {family.num_tile_tokens(reducer)} "
            f"each; an image of fewer tiles has as much less{more}"
        )
    if "video" in family.kinds:
        before, after = (family.num_video_tokens(which, cfg.model.num_frames) for which in (full, reducer))
        rows[f"video of {cfg.model.num_frames} frames"] = f"{before:,} before, {after:,} after"
    return rows


def _memory_rows(
    cfg: DictConfig, family: Family, *, num_trainable: int, num_visual: int, world_size: int
) -> dict[str, str]:
    """The micro batch of one rank, and the memory that it takes, at `num_visual` visual tokens a row; or why none fits."""
    if cfg.data.cache and not asks_questions(cfg):
        family.drop_towers()
    card = card_of(cfg)
    memory = resident_memory(cfg, family, num_trainable=num_trainable, world_size=world_size)
    if cfg.engine == "reference":
        micro = f"{cfg.batch.micro} rows, padded, layers checkpointed"
        memory += padded_memory(
            family, num_tokens=cfg.batch.micro * (num_visual + cfg.data.expected.text_tokens)
        )
    else:
        try:
            longest = num_visual + min(cfg.data.expected.longest, cfg.data.max_tokens)
            lengths = LongestExamples(longest, NUM_PREFIX)
            packing = fit_packing(
                cfg, family, card, num_trainable=num_trainable, lengths=lengths, world_size=world_size
            )
        except UserError as error:
            return {"a micro batch": f"none: {error}"}
        how = "MLPs computed again in the backward pass" if packing.recompute else "nothing computed twice"
        micro = f"up to {packing.tokens:,} packed tokens, {how}"
        memory += micro_batch_memory(cfg, family, packing, lengths)
    weights = weight_memory(family, quantize=cfg.quantize)
    held = f", the language model in {cfg.quantize}: gradients are not exact" if cfg.quantize else ""
    return {
        "a micro batch": micro,
        "memory a rank": f"{memory / 1e9:,.1f} GB, of {card.name}; all weights {weights / 1e9:,.1f} GB{held}",
    }


def print_plan(cfg: DictConfig, *, world_size: int) -> None:
    """Model, trainable table, visual tokens before and after, batch arithmetic, FLOPs, memory and time."""
    family, reducer = count_model(cfg), build_reducer(cfg)
    reducers = build_reducers(cfg)
    family.refuse_unfit(reducer)
    trainable = make_trainable(family, cfg.tune)
    print_trainable(family, trainable)

    expected = cfg.data.expected
    num_examples = round(expected.rows * cfg.data.fraction)
    batches = batch_plan(cfg, num_examples=num_examples, world_size=world_size)
    num_tiles, num_visual_tokens = _visual(family, cfg, reducer)
    cost = example_cost(
        family,
        reducer,
        num_tiles=num_tiles,
        num_visual_tokens=num_visual_tokens,
        num_text_tokens=expected.text_tokens,
    )
    flops = cost.total * cfg.batch.size * batches.num_steps
    memory_rows = _memory_rows(
        cfg,
        family,
        num_trainable=trainable.num_parameters,
        num_visual=num_visual_tokens,
        world_size=world_size,
    )
    parts = f"tower {cost.tower / 1e9:,.0f}, projector {cost.projector / 1e9:,.1f}, language {cost.language / 1e9:,.0f} GFLOP"
    table = Table(show_header=False, title="plan", title_justify="left")
    for name, value in {
        "model": f"{cfg.model.name} ({cfg.model.id}, weights={cfg.weights})",
        "reducer": "; ".join(map(repr, reducers))
        + ("; the plan is of the largest" if len(reducers) > 1 else ""),
        **_token_rows(family, cfg, reducer),
        "rows": f"{num_examples:,} = {cfg.data.fraction:g} of {expected.rows:,}, at {expected.text_tokens} text tokens (estimated)",
        "batches": str(batches),
        "compute": f"{flops / 1e15:,.1f} PFLOP for all tokens, of which engine=fast runs fewer; a row: {parts}",
        **memory_rows,
        "time on one H100": f"{_duration(flops / H100_PEAK / MFU)} at {MFU:.0%} of its peak",
        "time here": f"{_duration(flops / measured_peak() / MFU / world_size)} at {MFU:.0%} of the measured peak",
    }.items():
        table.add_row(name, value)
    Console().print(table)
