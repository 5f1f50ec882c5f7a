"""Measure optimizer steps of the fast path against the reference path: same weights, same global batches, in alternation.

The reference is the stock path: batches of rows of like length, padded to the longest; every layer of the language model
checkpointed; logits of all tokens in float32; rows without a picture run like the others; the vision tower with all attention
maps of all layers, as the released code has it. The fast path is what `make tune` runs. The micro batches of both are collated
before, as by a loader's workers, and both end a step with AdamW, at a learning rate of 0, so that the weights stay.

Rows have the recorded lengths of LLaVA's mix. "tiny" has Vicuna's proportions and 576 patches behind VisionZip(54, 10), for a
CPU; the others are published models with random weights, for one GPU. What counts as necessary are the tokens that the gradient
needs, each once: the tower up to the tapped layer; the language model forward, and backward to its inputs; the last layer's MLP
and the head where a label follows.

python -m scripts.bench.step --shape llava-7b next-7b llava-13b --json bench.json
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

# As train/tune.py has it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.batches.collate import PackedBatch
from data.paths import write_json
from scripts.bench.paths import EnginePath, fitting_tokens, kept_widths, make_fast, make_reference
from scripts.bench.shapes import Shape, make_family, make_steps, necessary_flops, necessary_tokens, shape_of
from scripts.common.timing import alternating, peak_flops, peak_memory, synchronise, where
from train.cli import count, writable
from train.hardware import best_device
from train.losses import ReferenceLoss
from vzip import UserError
from vzip.cost import weight_memory

SHAPES = ("tiny", "llava-7b", "llava-13b", "next-7b")
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Of the difference between both gradients, relative to the reference's. In bf16 32 layers of random weights make 0.1 of it."""
FEW_ROWS, FEW_LAYERS, FEW_TOLERANCE = 10, 4, {"float32": 1e-3, "bfloat16": 0.08}
"""Of the comparison of a few rows; 4 layers make 0.03 of it in bf16."""
STAGES = ("data", "tower", "reducer", "language forward", "backward", "optimizer")
"""The tower's begins with the way to the device; the reducer's is what lies between tower and projector."""
TENTH = 66_529
"""Rows of the tenth of the mix."""


def compare(found: Tensor, expected: Tensor, dtype: str, tolerance: float) -> float:
    """The difference of two gradients, relative to the expected one; ends the program where it is more than rounding."""
    error = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
    if not error <= tolerance:
        sys.exit(
            f"the gradients differ by {error:.1e} in {dtype}, more than {tolerance:g}; times would say nothing"
        )
    return error


def step_difference(fast: EnginePath, reference: EnginePath, dtype: str, tolerance: float) -> float:
    """Of both ways' gradients of a whole step. In bf16 both have the fast path's tower: rounding draws the least salient kept
    patch there, and a gradient of random weights hangs on which it is.
    """
    plain = reference
    if dtype != "float32":
        loss = ReferenceLoss(fast.loss.family, reference.loss.reducer, text_has_gradient=False)
        plain = EnginePath(loss, reference.steps, reference.device)
    return compare(fast.gradient(fast.batches[0]), plain.gradient(reference.batches[0]), dtype, tolerance)


def few_rows_difference(shape: Shape, *, device: torch.device, dtype: str) -> float:
    """The same of a few rows in some micro batches and a language model of few layers, where rounding hides no mistake."""
    forget_kernels(device)
    family, reducer = (
        make_family(shape.shallow(FEW_LAYERS), device=device, dtype=getattr(torch, dtype)),
        shape.reducer,
    )
    steps = make_steps(family, num_steps=1, num_examples=FEW_ROWS)
    fast = make_fast(family, reducer, steps, tokens=2048, device=device)
    reference = make_reference(family, reducer, steps, micro=FEW_ROWS // 2, device=device)
    for way in (fast, reference):
        way.batches = [way.collate(0)]
    return step_difference(fast, reference, dtype, FEW_TOLERANCE[dtype])


def forget_kernels(device: torch.device) -> None:
    """Of other shapes and precisions: beyond some, torch.compile makes no more, without a word."""
    if device.type == "cuda":
        torch.compiler.reset()


class Laps:
    """Seconds of each stage, each with the device's work done.

    Args:
        device: whose work is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, Counter[str]()
        synchronise(device)
        self.last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        """The stage is over."""
        synchronise(self.device)
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


def stage_seconds(way: EnginePath) -> dict[str, float]:
    """Seconds of each of `STAGES` in step 0, which is slower for being watched."""
    lap, family = Laps(way.device), way.loss.family
    handles = [
        family.tower.register_forward_hook(lambda *_: lap("tower")),
        family.projector.register_forward_pre_hook(lambda *_: lap("reducer")),
    ]
    batches = way.collate(0)
    lap("data")
    way.backward(0, batches, lap=lap)
    way.update()
    lap("optimizer")
    for handle in handles:
        handle.remove()
    return {stage: lap.seconds[stage] for stage in STAGES}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def rates(amounts: Sequence[float], seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each way, an amount of each round over its seconds."""
    return {
        name: spread([amount / time for amount, time in zip(amounts, times, strict=True)])
        for name, times in seconds.items()
    }


def timed(fast: EnginePath, reference: EnginePath, *, rounds: int) -> dict[str, Any]:
    """Seconds of steps and of their stages, memory, and what follows from them, by way."""
    ways, device = {"reference": reference, "fast": fast}, fast.device
    seconds = alternating({name: way.step for name, way in ways.items()}, rounds=rounds, device=device)
    stages: dict[str, dict[str, float]] = {}
    peaks = {
        name: peak_memory(lambda name=name, way=way: stages.update({name: stage_seconds(way)}), device)
        for name, way in ways.items()
    }
    return {
        "seconds": seconds,
        "steps_per_s": rates([1] * rounds, seconds),
        "ratio": spread([a / b for a, b in zip(seconds["reference"], seconds["fast"], strict=True)]),
        "tokens_per_s": rates([step.num_tokens(0) for step in fast.steps], seconds),
        "peak_bytes": peaks,
        "stage_s": stages,
    }


def measure_step(shape: Shape, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All figures of a model. Exits where the gradients are not the same."""
    dtype, num_examples, micro = (
        getattr(torch, arguments.dtype),
        arguments.rows or shape.rows,
        arguments.micro or shape.micro,
    )
    family, reducer = make_family(shape, device=device, dtype=dtype), shape.reducer
    steps = make_steps(family, num_steps=arguments.rounds, num_examples=num_examples)
    tokens = arguments.tokens or fitting_tokens(family, reducer, device)
    few = {
        name: few_rows_difference(shape, device=device, dtype=name) for name in {"float32", arguments.dtype}
    }

    forget_kernels(device)
    lap = Laps(device)
    fast = make_fast(family, reducer, steps, tokens=tokens, device=device)
    fast.backward(0, fast.collate(0))
    fast.update()
    lap("first step")

    reference = make_reference(family, reducer, steps, micro=micro, device=device)
    for way in (fast, reference):
        way.batches = [way.collate(number) for number in range(len(steps))]
    difference = step_difference(fast, reference, arguments.dtype, TOLERANCE[arguments.dtype])
    peak, peak_from = peak_flops(device, dtype)
    found = timed(fast, reference, rounds=arguments.rounds)

    flops = [necessary_flops(family, reducer, rows) for rows in steps]
    necessary = sum(necessary_tokens(row, family.num_image_tokens(reducer)) for rows in steps for row in rows)
    first = fast.batches[0][0]
    assert isinstance(first, PackedBatch)
    return found | {
        "reducer": repr(reducer),
        "dtype": arguments.dtype,
        "rows": num_examples,
        "micro": micro,
        "tokens": tokens,
        "gradient_difference": difference,
        "few_rows_difference": few,
        "slots_per_necessary": {
            "reference": reference.num_slots / necessary,
            "fast": fast.num_slots / necessary,
        },
        "necessary_flops": statistics.mean(flops),
        "peak_flops": peak,
        "peak_flops_from": peak_from,
        "mfu": rates([count / peak for count in flops], found["seconds"]),
        "weight_bytes": weight_memory(family),
        "kept_widths": kept_widths(family, first, fast.loss.prefix, device),
        "first_step_s": lap.seconds["first step"],
        "tenth_minutes": {
            name: TENTH / num_examples * statistics.median(times) / 60
            for name, times in found["seconds"].items()
        },
    }


def print_step(name: str, found: dict[str, Any], *, extrapolated: bool) -> None:
    """Print the table of a model."""
    ways = ("reference", "fast")
    table = Table(
        title=f"{name}, {found['reducer']}, {found['dtype']}, {found['rows']} rows a step",
        title_justify="left",
    )
    for column in ("", *ways):
        table.add_column(column, justify="right" if column else "left")

    def add(title: str, figures: dict[str, Any], form: str, *, scale: float = 1.0) -> None:
        cells = []
        for way in ways:
            value = figures[way]
            ends = value if isinstance(value, dict) else {"median": value}
            texts = ["" if end is None else format(scale * end, form) for end in ends.values()]
            cells.append(texts[0] + (f" ({texts[1]} to {texts[2]})" if len(texts) > 1 else ""))
        table.add_row(title, *cells)

    add("steps/s (least to most)", found["steps_per_s"], ".3g")
    add("real tokens/s", found["tokens_per_s"], ",.0f")
    add("token slots / necessary tokens", found["slots_per_necessary"], ".2f")
    add("necessary operations / peak (MFU)", found["mfu"], ".1%")
    add("memory beside the weights, GB", found["peak_bytes"], ".2f", scale=1e-9)
    if extrapolated:
        add("the whole tenth, from these steps, minutes", found["tenth_minutes"], ",.1f")
    for stage in STAGES:
        add(f"  {stage}, s", {way: found["stage_s"][way][stage] for way in ways}, ".3f")
    console = Console(width=None if sys.stdout.isatty() else 128, highlight=False)
    console.print(table)
    ratio = found["ratio"]
    lines = [
        f"fast / reference: {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f}); gradients differ by "
        f"{found['gradient_difference']:.1e} in {found['dtype']}, those of a few rows through {FEW_LAYERS} layers by "
        + " and ".join(
            f"{error:.1e} in {dtype}" for dtype, error in sorted(found["few_rows_difference"].items())
        ),
        f"necessary: {found['necessary_flops'] / 1e12:,.2f} TFLOP a step; peak {found['peak_flops'] / 1e12:,.2f} TFLOP/s, "
        f"{found['peak_flops_from']}",
        f"fast: first step {found['first_step_s']:.2f} s after the model is made; keeps {found['kept_widths']:.1f} d bytes a "
        f"token and layer in bf16; weights {found['weight_bytes'] / 1e9:.2f} GB; up to {found['tokens']:,} tokens a batch",
    ]
    console.print(*lines, sep="\n")


def parse_bench_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's arguments, by default those it was called with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--rows", type=count, help="of a step; by default 128, with tiny 64")
    parser.add_argument(
        "--micro", type=count, help="rows of a micro batch of the reference; by default 16, with tiny 8"
    )
    parser.add_argument(
        "--tokens", type=count, help="of a micro batch of the fast path; by default at most 16,384, as fit"
    )
    parser.add_argument("--rounds", type=count, default=5, help="of which the median is shown")
    parser.add_argument("--json", type=writable, help="file to write all figures to")
    arguments = parser.parse_args(given)
    if best_device().type != "cuda" and (large := [name for name in arguments.shape if name != "tiny"]):
        parser.error(f"--shape {large[0]} needs a GPU, and there is none; `--shape tiny` is for a CPU")
    return arguments


def main() -> None:
    """Measure, print, and write what was asked for."""
    arguments, device = parse_bench_arguments(), best_device()
    figures: dict[str, Any] = {"where": where(device), "shapes": {}}
    print(", ".join(f"{name} {value}" for name, value in figures["where"].items()))
    for name in arguments.shape:
        try:
            found = measure_step(shape_of(name), arguments, device)
        except UserError as error:
            sys.exit(f"error: {error}")
        gc.collect()  # the model, before the next one
        print_step(name, found, extrapolated=name != "tiny")
        figures["shapes"][name] = found
        if arguments.json is not None:  # after each model: a machine may be taken back
            write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
