"""Compare the vision tower and the reducer with the authors' code, in CLIP ViT-L/14-336's shape.

The weights are random, with attention as uneven as in a trained tower. Both paths have the same
weights, pictures and reducer. In float32 they must keep exactly the same tokens. In bf16 the least
salient kept token may differ.

python -m scripts.bench.tower --dtype float32 bfloat16 --batch 1 4 --json tower.json
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from scripts.bench.command import bench_parser, print_environment, print_table
from scripts.bench.released import LAYER, eager_copy, released_tokens
from scripts.bench.shapes import shape_of, sharpen_attention
from scripts.common.timing import alternating, peak_memory, where
from train.cli import count
from train.hardware import best_device
from vzip.files import write_json
from vzip.reducers.base import ReducerOutput
from vzip.reducers.visionzip import VisionZip
from vzip.tap import run_tower

REDUCER = VisionZip(dominant=54, contextual=10)


def clip_large() -> dict[str, Any]:
    """Return the config of CLIP ViT-L/14-336, LLaVA-1.5's vision tower."""
    config: dict[str, Any] = shape_of("llava-7b").architecture["vision_config"]
    return config


def make_tower(architecture: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make a frozen vision tower with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        tower: nn.Module = AutoModel.from_config(AutoConfig.for_model(**architecture), dtype=dtype)

    # From uniform attention, rounding would choose the kept tokens.
    sharpen_attention(tower)
    return tower.requires_grad_(False).eval()


@torch.no_grad()
def reduce_ours(tower: nn.Module, pixel_values: Tensor, reducer: VisionZip = REDUCER) -> ReducerOutput:
    """Run tower and reducer on float[B, 3, height, width], like an attached model."""
    return reducer(run_tower(tower, pixel_values, feature_layer=LAYER, num_dropped=1, attention_layer=LAYER))


@torch.no_grad()
def reduce_released(tower: nn.Module, pixel_values: Tensor, reducer: VisionZip = REDUCER) -> ReducerOutput:
    """Run the same in the steps of the authors' code. `tower` is an `eager_copy`."""
    return reducer(released_tokens(tower, pixel_values))


def share_in_common(one: ReducerOutput, other: ReducerOutput) -> float:
    """Compute the share of kept and merged-into tokens that both outputs have in common."""
    # Per picture first, then the mean over the pictures.
    shares = []
    for tokens, other_tokens in zip(_kept(one), _kept(other), strict=True):
        shares.append(len(set(tokens) & set(other_tokens)) / len(tokens))
    return statistics.mean(shares)


def _kept(output: ReducerOutput) -> list[list[int]]:
    """Indices of the dominant and contextual tokens of each picture."""
    tokens: list[list[int]] = torch.cat([output.dominant, output.contextual], dim=1).tolist()
    return tokens


def measure_tower(tower: nn.Module, *, batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure one batch size. Exit if the two paths keep different tokens in float32.

    Args:
        tower: the vision tower.
        batch: number of pictures.
        rounds: rounds of the timing.
        device: where the tower is.
    """
    config: Any = tower.config
    dtype = next(tower.parameters()).dtype
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, device=device, dtype=dtype)

    # Both share the weights, so the copy takes no memory for them.
    eager = eager_copy(tower)
    works: dict[str, Callable[[], ReducerOutput]] = {
        "released": lambda: reduce_released(eager, pixels),
        "ours": lambda: reduce_ours(tower, pixels),
    }

    # The runs whose memory is measured also give the outputs to compare.
    outputs: dict[str, ReducerOutput] = {}
    peaks = {}
    for name, work in works.items():
        peaks[name] = peak_memory(lambda name=name, work=work: outputs.update({name: work()}), device)

    # In float32, other tokens mean a mistake. Then times would compare different computations.
    released, ours = outputs["released"], outputs["ours"]
    same_tokens = torch.equal(released.slots, ours.slots)
    if dtype == torch.float32 and not same_tokens:
        sys.exit(f"batch {batch}, float32: the two paths keep different tokens; their times say nothing")
    difference = (released.features - ours.features).float().norm() / released.features.float().norm()

    # Ratios are taken within a round, in which the machine is equally fast for both.
    seconds = alternating(works, rounds=rounds, device=device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [slow / fast for slow, fast in zip(seconds["released"], seconds["ours"], strict=True)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "same_tokens": same_tokens,
        "in_common": share_in_common(released, ours),
        "feature_difference": difference.item(),
        "seconds": seconds,
        "median_s": medians,
        "ratio": medians["released"] / medians["ours"],
        "ratio_range": [min(ratios), max(ratios)],
        "peak_bytes": peaks,
    }


def print_tower(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="vision tower + reducer, CLIP ViT-L/14-336, 54 + 10 tokens", title_justify="left")
    table.add_column("precision")
    columns = (
        "pictures",
        "same tokens",
        "released",
        "ours",
        "ratio (of rounds)",
        "peak, released",
        "peak, ours",
    )
    for column in columns:
        table.add_column(column, justify="right")

    # If all tokens are the same, show how far rounding moves their features.
    for row in rows:
        same_tokens = f"{row['in_common']:.1%}"
        if row["same_tokens"]:
            same_tokens = f"all; features {row['feature_difference']:.1e}"
        times = [f"{1000 * row['median_s'][name]:,.0f} ms" for name in ("released", "ours")]
        low, high = row["ratio_range"]
        ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        peaks = [
            f"{peak / 2**20:,.0f} MiB" if peak is not None else "" for peak in row["peak_bytes"].values()
        ]
        table.add_row(row["dtype"], str(row["batch"]), same_tokens, *times, ratio, *peaks)

    print_table(table)


def main() -> None:
    """Measure, print, and write the figures."""
    device = best_device()
    parser = bench_parser(__doc__)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    default_batch = [1, 16] if device.type == "cuda" else [1, 2]
    parser.add_argument("--batch", nargs="+", type=count, default=default_batch, help="numbers of pictures")
    arguments = parser.parse_args()

    environment = where(device)
    print_environment(environment)

    config = clip_large()
    size = (1, 3, config["image_size"], config["image_size"])
    rows = []
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        tower = make_tower(config, device=device, dtype=dtype)

        # Run once before: what libraries allocate at first would count in the first measurement.
        reduce_released(eager_copy(tower), torch.randn(size, device=device, dtype=dtype))

        for batch in arguments.batch:
            rows.append(measure_tower(tower, batch=batch, rounds=arguments.rounds, device=device))

    print_tower(rows)
    if arguments.json is not None:
        write_json(arguments.json, {"where": environment, "rows": rows})


if __name__ == "__main__":
    main()
