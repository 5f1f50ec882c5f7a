"""The dry run: what a run would do and cost, without weights, data or a GPU."""

import time

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from train.config import batch_plan, build
from train.models import count_model
from train.trainable import make_trainable, print_table
from vzip.cost import row_cost, tuning_memory
from vzip.reducers.identity import Identity

H100_PEAK, MFU = 989e12, 0.4
"""bf16 FLOP/s of an H100 SXM, and the share of a device's peak that the estimate counts on."""


def measured_peak() -> float:
    """FLOP/s of a bf16 matrix product on this machine, by a short measurement."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, rounds = (8192, 10) if device == "cuda" else (1024, 3)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    a @ a
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        a @ a
    if device == "cuda":
        torch.cuda.synchronize()
    return 2 * size**3 * rounds / (time.perf_counter() - start)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def print_plan(cfg: DictConfig, *, world_size: int) -> None:
    """Model, trainable table, tokens an image before and after, batch arithmetic, FLOPs, memory and time."""
    family = count_model(cfg)
    frozen_bytes = sum(p.numel() * p.element_size() for p in family.model.parameters())
    reducer = build(cfg.reducer)
    before, after = family.num_image_tokens(Identity()), family.num_image_tokens(reducer)
    trainable = make_trainable(family, cfg.tune)
    print_table(family, trainable)

    expected = cfg.data.expected
    num_rows = round(expected.rows * cfg.data.fraction)
    batches = batch_plan(cfg, num_rows=num_rows, world_size=world_size)
    cost = row_cost(family, num_patches=before, num_image_tokens=after, num_text_tokens=expected.text_tokens)
    flops = cost.total * batches.size * batches.num_steps
    num_tokens = batches.micro * (after + expected.text_tokens)
    memory = tuning_memory(family, num_trainable=trainable.num_parameters, num_tokens=num_tokens)
    parts = f"tower {cost.tower / 1e9:,.0f}, projector {cost.projector / 1e9:,.1f}, language {cost.language / 1e9:,.0f} GFLOP"
    table = Table(show_header=False, title="plan", title_justify="left")
    for name, value in {
        "model": f"{cfg.model.name} ({cfg.model.id}, weights={cfg.weights})",
        "reducer": repr(reducer),
        "tokens an image": f"{before} before, {after} after",
        "rows": f"{num_rows:,} = {cfg.data.fraction:g} of {expected.rows:,}, at {expected.text_tokens} text tokens (estimated)",
        "batches": str(batches),
        "compute": f"{flops / 1e15:,.1f} PFLOP; a row: {parts}",
        "memory a rank": f"{memory / 1e9:,.1f} GB, of it frozen weights {frozen_bytes / 1e9:,.1f} GB",
        "time on one H100": f"{_duration(flops / H100_PEAK / MFU)} at {MFU:.0%} of its peak",
        "time here": f"{_duration(flops / measured_peak() / MFU / world_size)} at {MFU:.0%} of the measured peak",
    }.items():
        table.add_row(name, value)
    Console().print(table)
