"""Time prefill and generated tokens for several numbers of visual tokens.

The models have the shapes of configs/model and random weights. `vzip.attach` puts a reducer in front
of them. The shape "tiny", for a CPU, has a fraction of the published widths and depths, and pictures
keep their 576 patches. "LM" is the prefill of ready embeddings, which the paper measures. "all"
starts at the pixels. Beside each ratio stands the one that the cost formula of `vzip.cost` gives.

python -m scripts.bench.prefill --shape tiny --batch 1 8 --json prefill.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from scripts.bench.command import bench_parser, check_gpu, print_environment, print_table
from scripts.bench.shapes import random_family, shape_of, shrink
from scripts.common.prefill import PARTS, Prefill, TimingPlan, measure_prefill
from scripts.common.timing import where
from train.cli import count
from train.hardware import best_device
from vzip.families import Family
from vzip.files import write_json
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip

# The models of each table, by shape. The first one keeps all tokens, and the last one has each of
# the budgets.
SHAPES: dict[str, Sequence[tuple[str, ...]]] = {
    "tiny": (("llava-7b",), ("next-7b",), ("llava-7b", "llava-13b")),
    "llava-7b": (("llava-7b",),),
    "llava-13b": (("llava-13b",),),
    "next-7b": (("next-7b",),),
    "compare": (("llava-7b", "llava-13b"), ("next-7b", "next-13b")),
}

# The paper's budgets, by the number of tiles that share a budget.
BUDGETS = {1: (192, 128, 64), 5: (640, 320, 160)}

# What the sizes of the published models are divided by for the shape "tiny".
DIVISORS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "vocab_size": 16,
    "image_token_index": 16,
    "projection_dim": 16,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}

# Text tokens of a prompt.
NUM_TEXT = 40


def build_family(name: str, *, tiny: bool, device: torch.device) -> Family:
    """Make the model of configs/model/NAME.yaml with random weights. A tiny one is in float32."""
    shape = shape_of(name)
    if tiny:
        shape = replace(shape, architecture=shrink(shape.architecture, DIVISORS), dtype=torch.float32)
    return random_family(shape, device=device, dtype=shape.dtype)


def noise_inputs(
    family: Family, reducer: Reducer, *, batch: int, num_text: int = NUM_TEXT
) -> dict[str, Tensor]:
    """Make the model's arguments: for each prompt a square picture of noise in random text.

    Args:
        family: around the model.
        reducer: decides the number of placeholders.
        batch: number of prompts.
        num_text: text tokens of a prompt.
    """
    # Everything is made where the model is.
    weight = next(family.tower.parameters())
    device = weight.device
    has_tiles = family.budget_tiles > 1

    # A picture of two tiles on each side has five tiles, with the small copy of the whole picture.
    side = 2 * family.tile_side if has_tiles else family.tile_side
    tiles = (family.num_tiles((side, side)),) if has_tiles else ()
    pixel_shape = (batch, *tiles, 3, family.tile_side, family.tile_side)

    # The ids below the placeholder's are text. The visual tokens stand in the middle of it.
    placeholder = family.placeholder_id("image")
    num_visual = family.num_image_tokens(reducer, (side, side))
    ids = torch.randint(placeholder, (batch, num_visual + num_text), device=device)
    start = num_text // 2
    ids[:, start : start + num_visual] = placeholder

    inputs = {"input_ids": ids, "pixel_values": torch.randn(pixel_shape, device=device, dtype=weight.dtype)}
    if has_tiles:
        inputs["image_sizes"] = torch.tensor([[side, side]] * batch, device=device)
    return inputs


def make_cases(families: Mapping[str, Family], *, batch: int) -> dict[str, Prefill]:
    """Make the first model with all tokens, and the last one with each of the paper's budgets."""
    first, *_ = families
    *_, last = families
    pairs: dict[str, tuple[Family, Reducer]] = {f"{first}, all": (families[first], Identity())}

    # If there is only one model, it is both the first and the last.
    tiles = families[last].budget_tiles
    for budget in BUDGETS[tiles]:
        pairs[f"{last}, {budget}"] = (families[last], VisionZip(budget=budget, tiles=tiles))

    cases = {}
    for name, (family, reducer) in pairs.items():
        cases[name] = Prefill(family, reducer, noise_inputs(family, reducer, batch=batch))
    return cases


def print_prefill(title: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table of some cases: their milliseconds, and their speed relative to the first."""
    table = Table(title=title, title_justify="left")
    table.add_column("model, tokens")
    columns = (
        "visual",
        "LM ms",
        "ratio",
        "formula",
        "all ms",
        "ratio",
        "formula",
        "new token ms",
        "ratio",
        "KV MiB",
    )
    for column in columns:
        table.add_column(column, justify="right")

    # Ratios compare with the first case, which keeps all tokens.
    base = next(iter(figures.values()))
    for name, row in figures.items():
        cells = [f"{row['num_visual_tokens']:,}"]
        for part in PARTS:
            # The formula has no figure for a generated token.
            seconds = row[part]["median_s"]
            cells += [f"{1000 * seconds:,.1f}", f"{base[part]['median_s'] / seconds:.2f}"]
            if part != "token":
                cells.append(f"{base[f'{part}_flops'] / row[f'{part}_flops']:.2f}")
        table.add_row(name, *cells, f"{row['kv_bytes'] / 2**20:,.1f}")

    print_table(table)


def run_series(
    names: Sequence[str], *, tiny: bool, batches: Sequence[int], plan: TimingPlan
) -> list[dict[str, Any]]:
    """Measure some models in each batch size, and print the tables."""
    # Both models of a comparison must be there at once, because the cases take turns.
    families = {name: build_family(name, tiny=tiny, device=plan.device) for name in names}
    scale = "tiny, float32" if tiny else "bf16"
    series = []
    for batch in batches:
        figures = measure_prefill(make_cases(families, batch=batch), plan)
        title = f"{' against '.join(reversed(names))} ({scale}), batch {batch}, {NUM_TEXT} text tokens"
        print_prefill(title, figures)
        series.append({"models": names, "batch": batch, "cases": figures})
    return series


def main() -> None:
    """Measure, print, and write the figures."""
    parser = bench_parser(__doc__)
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="tiny",
        help="all but tiny need a GPU; compare needs one of 80 GB",
    )
    parser.add_argument("--batch", nargs="+", type=count, default=[1, 8])
    parser.add_argument("--new-tokens", type=count, default=8, help="generated tokens that are timed")
    arguments = parser.parse_args()
    check_gpu(parser, [arguments.shape])

    device = best_device()
    environment = where(device)
    print_environment(environment)

    plan = TimingPlan(new_tokens=arguments.new_tokens, rounds=arguments.rounds, device=device)
    is_tiny = arguments.shape == "tiny"
    series = []
    for names in SHAPES[arguments.shape]:
        series += run_series(names, tiny=is_tiny, batches=arguments.batch, plan=plan)

    if arguments.json is not None:
        figures = {"where": environment, "shape": arguments.shape, "num_text": NUM_TEXT, "series": series}
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
