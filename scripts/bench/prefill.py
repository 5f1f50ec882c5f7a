"""Measure prefill and time per generated token against the number of visual tokens, with and without the vision tower.

The models are the families' own, with random weights in the shapes of configs/model, behind a reducer as `vzip.attach` puts it
there; with `tiny`, for a CPU, all widths and depths are a fraction of these, in the same proportions, and the pictures keep
their 576 patches. "language model" is the prefill of ready embeddings, as the paper measures it; "with the tower" starts at the
pixels. Beside each ratio stands the one that the cost formula gives (`vzip.cost`).

python -m scripts.bench.prefill --shape tiny --batch 1 8 --json prefill.json
"""

import argparse
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.paths import ROOT, write_json
from scripts.common.prefill import PARTS, Prefill, TimingPlan, measure_prefill
from scripts.common.timing import where
from train.cli import count, writable
from train.hardware import best_device
from vzip.families import Family
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip

SHAPES: dict[str, Sequence[tuple[str, ...]]] = {
    "tiny": (("llava-7b",), ("next-7b",), ("llava-7b", "llava-13b")),
    "llava-7b": (("llava-7b",),),
    "llava-13b": (("llava-13b",),),
    "next-7b": (("next-7b",),),
    "compare": (("llava-7b", "llava-13b"), ("next-7b", "next-13b")),
}
"""Tables of each shape: the first model with all its tokens, against the last one with each of the paper's budgets."""
BUDGETS = {1: (192, 128, 64), 5: (640, 320, 160)}
"""The paper's, by the number of tiles that they are the total of."""
FRACTIONS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "vocab_size": 16,
    "projection_dim": 16,
    "num_hidden_layers": 8,
}
FRACTIONS |= {"num_attention_heads": 4, "num_key_value_heads": 4}
"""What the tiny models' shapes are divided by."""
NUM_TEXT = 40
"""Prompt tokens beside the visual ones."""


def _shrunk(architecture: Mapping[str, Any]) -> dict[str, Any]:
    made = {
        name: value // FRACTIONS.get(name, 1) if isinstance(value, int) else value
        for name, value in architecture.items()
    }
    parts = {name: _shrunk(part) for name, part in architecture.items() if isinstance(part, Mapping)}
    return made | parts


def build_shape(name: str, *, tiny: bool, device: torch.device) -> Family:
    """The model of configs/model/NAME.yaml with random weights, made on the device; a `tiny` one in float32."""
    model = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())["model"]
    family = pkgutil.resolve_name(model["_target_"])
    architecture = model["architecture"]
    if tiny:
        image = architecture["image_token_index"] // FRACTIONS["vocab_size"]
        architecture = _shrunk(architecture) | {"image_token_index": image}
    torch.manual_seed(0)
    with torch.device(device):
        made = family.from_architecture(
            architecture, dtype=torch.float32 if tiny else getattr(torch, model["dtype"])
        )
    return family(made.requires_grad_(False))


def made_up_inputs(
    family: Family, reducer: Reducer, *, batch: int, num_text: int = NUM_TEXT
) -> dict[str, Tensor]:
    """The model's arguments for one noisy picture and `num_text` tokens a row: a square, of 5 tiles where there are tiles."""
    weight = next(family.tower.parameters())
    side = family.tile_side * (2 if family.budget_tiles > 1 else 1)
    tiles = (family.num_tiles((side, side)),) if family.budget_tiles > 1 else ()
    num_visual, placeholder = family.num_image_tokens(reducer, (side, side)), family.placeholder_id("image")
    ids = torch.randint(
        placeholder, (batch, num_visual + num_text), device=weight.device
    )  # of text: the ids below it
    ids[:, num_text // 2 : num_text // 2 + num_visual] = placeholder
    shape = (batch, *tiles, 3, family.tile_side, family.tile_side)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(shape, device=weight.device, dtype=weight.dtype)}
    return inputs | (
        {"image_sizes": torch.tensor([[side, side]] * batch, device=weight.device)} if tiles else {}
    )


def make_cases(families: Mapping[str, Family], *, batch: int) -> dict[str, Prefill]:
    """The first model with all tokens, and the last one with each budget."""
    (first, full), *_, (last, reduced) = [*families.items(), *families.items()]
    tiles = reduced.budget_tiles
    budgets = {
        f"{last}, {budget}": (reduced, VisionZip(budget=budget, tiles=tiles)) for budget in BUDGETS[tiles]
    }
    made: dict[str, tuple[Family, Reducer]] = {f"{first}, all": (full, Identity()), **budgets}
    return {
        name: Prefill(family, reducer, made_up_inputs(family, reducer, batch=batch))
        for name, (family, reducer) in made.items()
    }


def print_prefill(title: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table of a series of cases: milliseconds, and ratios of the first case's to the row's."""
    table = Table(title=title, title_justify="left")
    for column in ("model, tokens", "visual", "LM ms", "ratio", "formula", "all ms", "ratio", "formula"):
        table.add_column(column, justify="left" if column == "model, tokens" else "right")
    for column in ("new token ms", "ratio", "KV MiB"):
        table.add_column(column, justify="right")
    base = next(iter(found.values()))
    for name, row in found.items():
        times = {part: row[part]["median_s"] for part in PARTS}
        ratios = {part: f"{base[part]['median_s'] / times[part]:.2f}" for part in PARTS}
        cells = [f"{row['num_visual_tokens']:,}"]
        for part in ("language", "whole"):
            formula = base[f"{part}_flops"] / row[f"{part}_flops"]
            cells += [f"{1000 * times[part]:,.1f}", ratios[part], f"{formula:.2f}"]
        table.add_row(
            name, *cells, f"{1000 * times['token']:,.1f}", ratios["token"], f"{row['kv_bytes'] / 2**20:,.1f}"
        )
    Console(width=None if sys.stdout.isatty() else 128).print(table)


def run_series(
    names: Sequence[str], *, tiny: bool, batches: Sequence[int], settings: TimingPlan
) -> list[dict[str, Any]]:
    """Figures of models in each batch size, printed as they come; the models are gone afterwards."""
    families = {name: build_shape(name, tiny=tiny, device=settings.device) for name in names}
    made = []
    for batch in batches:
        found = measure_prefill(make_cases(families, batch=batch), settings)
        scale = "tiny, float32" if tiny else "bf16"
        print_prefill(
            f"{' against '.join(reversed(names))} ({scale}), batch {batch}, {NUM_TEXT} text tokens", found
        )
        made.append({"models": names, "batch": batch, "cases": found})
    return made


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="tiny", help="all but tiny need a GPU; compare one of 80 GB"
    )
    parser.add_argument("--batch", nargs="+", type=count, default=[1, 8])
    parser.add_argument("--rounds", type=count, default=5, help="of which the median is shown")
    parser.add_argument("--new-tokens", type=count, default=8, help="generated tokens that are timed")
    parser.add_argument("--json", type=writable, help="file to write all figures to")
    arguments = parser.parse_args()
    if arguments.shape != "tiny" and not torch.cuda.is_available():
        parser.error(f"--shape {arguments.shape} needs a GPU, and there is none; `--shape tiny` is for a CPU")
    device, tiny = best_device(), arguments.shape == "tiny"
    settings = TimingPlan(new_tokens=arguments.new_tokens, rounds=arguments.rounds, device=device)
    machine, series = where(device), []
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for names in SHAPES[arguments.shape]:
        series += run_series(names, tiny=tiny, batches=arguments.batch, settings=settings)
    if arguments.json is not None:
        write_json(
            arguments.json,
            {"where": machine, "shape": arguments.shape, "num_text": NUM_TEXT, "series": series},
        )


if __name__ == "__main__":
    main()
