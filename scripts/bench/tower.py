"""Measure the vision tower and the reducer at the shape of CLIP ViT-L/14-336, against the released code's way of running them.

The weights are random, queries and keys scaled so that attention is as far from uniform as a trained tower's: from uniform
attention the most salient tokens would be drawn by rounding. Both ways have the same weights, pictures and reducer, and must
keep the same tokens: exactly in float32; in bf16 the least salient kept token may be another one.

python -m scripts.bench.tower --dtype float32 bfloat16 --batch 1 4 --json tower.json
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from data.paths import write_json
from scripts.bench.released import LAYER, eager_copy, released_tokens
from scripts.common.timing import alternating, peak_memory, where
from train.cli import count, writable
from train.hardware import best_device
from vzip.reducers.base import ReducerOutput
from vzip.reducers.visionzip import VisionZip
from vzip.tap import run_tower

CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
PICTURE = {"image_size": 336, "patch_size": 14}
REDUCER = VisionZip(dominant=54, contextual=10)


def make_tower(architecture: dict[str, int], *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A CLIP tower with random weights; the 54 most salient of ViT-L's 576 patches have 59 % of what CLS gives to patches."""
    torch.manual_seed(0)
    with torch.device(device):
        tower: nn.Module = CLIPVisionModel._from_config(CLIPVisionConfig(**architecture), dtype=dtype)
    width = architecture["hidden_size"]
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):  # a query or key of a normalised token: variance 2.5
            parameter.normal_(std=(2.5 / width) ** 0.5)
    return tower.eval()


@torch.no_grad()
def reduce_ours(tower: nn.Module, pixel_values: Tensor, reducer: VisionZip = REDUCER) -> ReducerOutput:
    """float[B, 3, height, width] behind the tower and the reducer, as an attached model runs them."""
    return reducer(run_tower(tower, pixel_values, feature_layer=LAYER, num_dropped=1, attention_layer=LAYER))


@torch.no_grad()
def reduce_released(tower: nn.Module, pixel_values: Tensor, reducer: VisionZip = REDUCER) -> ReducerOutput:
    """The same with an `eager_copy`, the released code's way."""
    return reducer(released_tokens(tower, pixel_values))


def share_in_common(one: ReducerOutput, other: ReducerOutput) -> float:
    """Of the kept and merged-into tokens of all pictures: 1 where both ways have the same ones."""
    pairs = zip(
        torch.cat([one.dominant, one.contextual], dim=1).tolist(),
        torch.cat([other.dominant, other.contextual], dim=1).tolist(),
        strict=True,
    )
    return statistics.mean(len(set(a) & set(b)) / len(a) for a, b in pairs)


def measure_tower(tower: nn.Module, *, batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Figures of one batch size. Exits where float32 does not give the same tokens both ways."""
    config: Any = tower.config
    pixels = torch.randn(
        batch, 3, config.image_size, config.image_size, device=device, dtype=next(tower.parameters()).dtype
    )
    eager, made, peaks = eager_copy(tower), {}, {}
    works: dict[str, Callable[[], ReducerOutput]] = {
        "released": lambda: reduce_released(eager, pixels),
        "ours": lambda: reduce_ours(tower, pixels),
    }
    for name, work in works.items():
        peaks[name] = peak_memory(lambda name=name, work=work: made.update({name: work()}), device)
    released, ours = made["released"], made["ours"]
    same = torch.equal(released.slots, ours.slots)
    if pixels.dtype == torch.float32 and not same:
        sys.exit(f"batch {batch}, float32: the two ways keep different tokens; their times say nothing")
    difference = (released.features - ours.features).float().norm() / released.features.float().norm()
    seconds = alternating(works, rounds=rounds, device=device)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["released"], seconds["ours"], strict=True)]
    return {
        "dtype": str(pixels.dtype).removeprefix("torch."),
        "batch": batch,
        "same_tokens": same,
        "in_common": share_in_common(released, ours),
        "feature_difference": difference.item(),
        "seconds": seconds,
        "median_s": middle,
        "ratio": middle["released"] / middle["ours"],
        "ratio_range": [min(ratios), max(ratios)],
        "peak_bytes": peaks,
    }


def print_tower(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="vision tower + reducer, CLIP ViT-L/14-336, 54 + 10 tokens", title_justify="left")
    for column in (
        "precision",
        "pictures",
        "same tokens",
        "released",
        "ours",
        "ratio (of rounds)",
        "peak, released",
        "peak, ours",
    ):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for row in rows:
        low, high = row["ratio_range"]
        peaks = [
            f"{peak / 2**20:,.0f} MiB" if peak is not None else "" for peak in row["peak_bytes"].values()
        ]
        same = (
            f"all; features {row['feature_difference']:.1e}"
            if row["same_tokens"]
            else f"{row['in_common']:.1%}"
        )
        times = [f"{1000 * row['median_s'][name]:,.0f} ms" for name in ("released", "ours")]
        table.add_row(
            row["dtype"],
            str(row["batch"]),
            same,
            *times,
            f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
            *peaks,
        )
    Console(width=None if sys.stdout.isatty() else 128).print(table)


def main() -> None:
    """Measure, print, and write what was asked for."""
    device = best_device()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument(
        "--batch",
        nargs="+",
        type=count,
        default=[1, 16] if device.type == "cuda" else [1, 2],
        help="pictures",
    )
    parser.add_argument("--rounds", type=count, default=5, help="of which the median is shown")
    parser.add_argument("--json", type=writable, help="file to write all figures to")
    arguments = parser.parse_args()
    machine, rows = where(device), []
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for dtype in arguments.dtype:
        tower = make_tower(CLIP_LARGE | PICTURE, device=device, dtype=getattr(torch, dtype))
        first = torch.randn(
            1, 3, PICTURE["image_size"], PICTURE["image_size"], device=device, dtype=getattr(torch, dtype)
        )
        reduce_released(eager_copy(tower), first)  # libraries set themselves up, which would count as memory
        rows += [
            measure_tower(tower, batch=batch, rounds=arguments.rounds, device=device)
            for batch in arguments.batch
        ]
    print_tower(rows)
    if arguments.json is not None:
        write_json(arguments.json, {"where": machine, "rows": rows})


if __name__ == "__main__":
    main()
