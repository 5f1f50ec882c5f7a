"""The dry run: what a run would do and cost, without weights, data or a GPU."""

import time

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from train.config import accumulation, build
from train.models import count_model
from train.trainable import make_trainable, print_table
from vzip.attach import Handle
from vzip.cost import row_cost, tuning_memory
from vzip.reducers.identity import Identity
from vzip.tap import layer_index

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


def num_steps(cfg: DictConfig, num_rows: int) -> int:
    """Optimizer steps of a run over `num_rows` rows."""
    steps = max(1, round(cfg.optim.epochs * num_rows / cfg.batch.size))
    return min(steps, cfg.optim.max_steps) if cfg.optim.max_steps else steps


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def print_plan(cfg: DictConfig, *, world_size: int) -> None:
    """Model, trainable table, tokens an image before and after, batch arithmetic, FLOPs, memory and time."""
    family = count_model(cfg)
    frozen_bytes = sum(p.numel() * p.element_size() for p in family.model.parameters())
    handle = Handle(family.model, build(cfg.reducer))
    trainable = make_trainable(family, cfg.tune)
    print_table(family, trainable)

    before, after = family.num_image_tokens(Identity()), handle.num_image_tokens()
    parts = accumulation(cfg, world_size)
    num_rows = round(cfg.data.expected.rows * cfg.data.fraction)
    steps, text_tokens = num_steps(cfg, num_rows), cfg.data.expected.text_tokens
    config = family.model.config
    num_layers = config.vision_config.num_hidden_layers
    cost = row_cost(
        tower=family.tower,
        projector=family.projector,
        language_model=family.language_model,
        lm_head=family.lm_head,
        num_patches=before,
        num_layers_run=layer_index(config.vision_feature_layer, num_layers) + 1,
        num_image_tokens=after,
        num_text_tokens=text_tokens,
    )
    flops = cost.total * cfg.batch.size * steps
    num_trainable = sum(p.numel() for p in trainable.parameters.values())
    memory = tuning_memory(
        frozen_bytes=frozen_bytes, num_trainable=num_trainable, num_tokens=cfg.batch.micro * (after + text_tokens),
        hidden_size=config.text_config.hidden_size, num_layers=config.text_config.num_hidden_layers,
    )
    table = Table(show_header=False, title="plan", title_justify="left")
    for name, value in {
        "model": f"{cfg.model.name} ({cfg.model.id}, weights={cfg.weights})",
        "reducer": repr(handle.reducer),
        "tokens an image": f"{before} before, {after} after",
        "rows": f"{num_rows:,} ({cfg.data.fraction:g} of {cfg.data.expected.rows:,} expected in {cfg.data.path})",
        "batch": f"{cfg.batch.size} = {cfg.batch.micro} micro x {parts} accumulation x {world_size} ranks",
        "steps": f"{steps:,} ({cfg.optim.epochs:g} epochs)",
        "compute": f"{flops / 1e15:,.3g} PFLOP at {text_tokens} text tokens a row "
        f"(a row: tower {cost.tower / 1e9:,.0f}, projector {cost.projector / 1e9:,.1f}, language {cost.language / 1e9:,.0f} GFLOP)",
        "memory a rank": f"{memory / 1e9:,.1f} GB, of it frozen weights {frozen_bytes / 1e9:,.1f} GB",
        "time on one H100": f"{_duration(flops / H100_PEAK / MFU)} at {MFU:.0%} of its peak",
        "time here": f"{_duration(flops / measured_peak() / MFU / world_size)} at {MFU:.0%} of the measured peak, {world_size} ranks",
    }.items():
        table.add_row(name, value)
    Console().print(table)
