"""Compare optimizer steps of the fast path with those of the reference path, in alternation.

Both have the same weights and the same batches. The reference is the stock path: it pads examples of
similar length to the longest one, checkpoints every layer of the language model, and computes
float32 logits of all tokens. It also runs examples without a picture, and its vision tower returns
the attention maps of all layers, like the authors' code. The fast path is that of `make tune`. The
micro batches of both are built before, as a loader's workers would. Both end a step with AdamW, at
a learning rate of 0, so that the weights stay.

Examples have the recorded lengths of LLaVA's mix. The shape "tiny" has Vicuna's proportions and 576
patches behind VisionZip(54, 10), for a CPU. The other shapes are published models with random
weights, for one GPU. Necessary is what the gradient needs, each once: the tower up to the hooked
layer, and the language model forward and backward to its inputs. The last layer's MLP and the head
count only where a label follows.

python -m scripts.bench.step --shape llava-7b next-7b llava-13b --json bench.json
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

# The same settings as in train/tune.py. torch reads them when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from rich.table import Table
from torch import Tensor

from data.batches.collate import PackedBatch
from data.batches.dataset import BatchPlan
from data.examples.tokens import Examples
from scripts.bench.command import bench_parser, check_gpu, print_environment, print_table
from scripts.bench.examples import make_examples, necessary_flops, necessary_tokens
from scripts.bench.paths import EnginePath, fitting_tokens, kept_widths, make_fast, make_reference
from scripts.bench.shapes import Shape, shape_of, tunable_family
from scripts.common.timing import alternating, peak_flops, peak_memory, synchronize, where
from train.cli import count, exit_on_user_error
from train.hardware import best_device
from train.losses import ReferenceLoss
from vzip.cost import weight_memory
from vzip.families import Family
from vzip.files import write_json

SHAPES = ("tiny", "llava-7b", "llava-13b", "next-7b")
PATHS = ("reference", "fast")

# The largest difference that is allowed between the gradients of both paths, relative to the
# reference's. In bf16, 32 layers of random weights make a difference of 0.1.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}

# A second comparison has so few examples and layers that rounding hides no mistake. In bf16,
# rounding makes a difference of 0.03 there.
FEW_EXAMPLES = 10
FEW_LAYERS = 4
FEW_TOKENS = 2048
FEW_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.08}

# Stages of a step. The tower's stage begins with the copy to the device. The reducer's stage lies
# between tower and projector.
STAGES = ("data", "tower", "reducer", "language forward", "backward", "optimizer")

# Examples of the tenth of LLaVA's mix that the paper tunes on.
TENTH = 66_529


def plan_of(examples: Examples, *, num_steps: int) -> BatchPlan:
    """Plan steps that take each example once."""
    return BatchPlan(size=len(examples) // num_steps, world_size=1, num_steps=num_steps, seed=0)


def compare(gradient: Tensor, expected: Tensor, dtype: str, tolerance: float) -> float:
    """Return the difference of two gradients, relative to the expected one.

    Exits if it is more than rounding.
    """
    # Written as "not ... <=", so that a gradient of NaN is refused too.
    norm = torch.linalg.vector_norm
    error = float(norm(gradient - expected) / norm(expected))
    if not error <= tolerance:
        sys.exit(
            f"the gradients differ by {error:.1e} in {dtype}, more than {tolerance:g}; "
            f"times would say nothing"
        )
    return error


def step_difference(fast: EnginePath, reference: EnginePath, dtype: str, tolerance: float) -> float:
    """Compare the gradients of both paths over a whole step."""
    # In bf16 both run the fast path's tower. The two towers round differently, so they may keep
    # another least salient patch. With random weights that changes the gradient.
    if dtype != "float32":
        loss = ReferenceLoss(fast.loss.family, fast.loss.reducers[0], text_has_gradient=False)
        reference = EnginePath(loss, reference.batches, reference.device)

    expected = reference.gradient(reference.collate(0))
    return compare(fast.gradient(fast.collate(0)), expected, dtype, tolerance)


def few_examples_difference(shape: Shape, *, device: torch.device, dtype: str) -> float:
    """Compare the gradients of a few examples through a language model of few layers."""
    # The examples make several micro batches on both paths, so that adding up is compared too.
    forget_kernels(device)
    family = tunable_family(shape.with_layers(FEW_LAYERS), device=device, dtype=getattr(torch, dtype))
    examples = make_examples(family, num_examples=FEW_EXAMPLES)
    plan = plan_of(examples, num_steps=1)

    fast = make_fast(family, shape.reducer, examples, plan, tokens=FEW_TOKENS, device=device)
    reference = make_reference(family, shape.reducer, examples, plan, micro=FEW_EXAMPLES // 2, device=device)
    return step_difference(fast, reference, dtype, FEW_TOLERANCE[dtype])


def forget_kernels(device: torch.device) -> None:
    """Free the compiled kernels of other shapes and precisions."""
    # torch.compile keeps a limited number of them, and beyond it silently compiles no more.
    if device.type == "cuda":
        torch.compiler.reset()


class Laps:
    """Seconds of each stage, the device's work included.

    Args:
        device: runs the work. A stage ends when the device has finished.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = Counter[str]()
        synchronize(device)
        self.last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        """End a stage, and begin the next one."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


def stage_seconds(path: EnginePath) -> dict[str, float]:
    """Time each of `STAGES` in step 0. Waiting after each stage makes the step slower."""
    # Hooks end a stage where a module begins or ends.
    lap = Laps(path.device)
    family = path.loss.family
    handles = [
        family.tower.register_forward_hook(lambda *_: lap("tower")),
        family.projector.register_forward_pre_hook(lambda *_: lap("reducer")),
    ]

    # `backward` reports its own stages.
    micro_batches = path.collate(0)
    lap("data")
    path.backward(0, micro_batches, lap=lap)
    path.update()
    lap("optimizer")

    # Other steps must run without the hooks, which wait for the device.
    for handle in handles:
        handle.remove()
    return {stage: lap.seconds[stage] for stage in STAGES}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the most of some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def rates(amounts: Sequence[float], seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return the spread of amounts per second, by path. Both do the same amount in a round."""
    by_path = {}
    for name, times in seconds.items():
        by_path[name] = spread([amount / time for amount, time in zip(amounts, times, strict=True)])
    return by_path


def time_steps(fast: EnginePath, reference: EnginePath) -> dict[str, Any]:
    """Time the steps of both paths, then their stages, and measure their memory."""
    paths = {"reference": reference, "fast": fast}
    plan = fast.batches.plan
    works = {name: path.run_next_step for name, path in paths.items()}
    seconds = alternating(works, rounds=plan.num_steps, device=fast.device)

    # One more step of each path gives the times of its stages and its peak memory.
    peaks = {}
    stages: dict[str, dict[str, float]] = {}
    for name, path in paths.items():
        peaks[name] = peak_memory(
            lambda name=name, path=path: stages.update({name: stage_seconds(path)}), fast.device
        )

    # Ratios are taken within a round, in which the machine is equally fast for both.
    ratios = [slow / quick for slow, quick in zip(seconds["reference"], seconds["fast"], strict=True)]
    num_tokens = [fast.batches.num_tokens(step) for step in range(plan.num_steps)]
    return {
        "seconds": seconds,
        "steps_per_s": rates([1] * plan.num_steps, seconds),
        "ratio": spread(ratios),
        "tokens_per_s": rates(num_tokens, seconds),
        "peak_bytes": peaks,
        "stage_s": stages,
    }


def measure_step(shape: Shape, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure a model. Exit if the gradients of both paths differ.

    Raises:
        UserError: the GPU is too small.
    """
    dtype = getattr(torch, arguments.dtype)
    family = tunable_family(shape, device=device, dtype=dtype)
    tokens = arguments.tokens or fitting_tokens(family, shape.reducer, device)
    micro = arguments.micro or shape.micro
    batch_size = arguments.rows or shape.batch_size
    examples = make_examples(family, num_examples=batch_size * arguments.rounds)
    plan = plan_of(examples, num_steps=arguments.rounds)

    # Check that both paths compute the same before anything is timed.
    few_differences = {}
    for name in sorted({"float32", arguments.dtype}):
        few_differences[name] = few_examples_difference(shape, device=device, dtype=name)

    # Time the first step of the fast path, which also compiles its kernels.
    forget_kernels(device)
    lap = Laps(device)
    fast = make_fast(family, shape.reducer, examples, plan, tokens=tokens, device=device)
    fast.backward(0, fast.collate(0))
    fast.update()
    lap("first step")

    # Then compare the gradients of a whole step, through all layers.
    reference = make_reference(family, shape.reducer, examples, plan, micro=micro, device=device)
    difference = step_difference(fast, reference, arguments.dtype, TOLERANCE[arguments.dtype])

    # Build all micro batches now, so that the timed steps don't wait for pictures.
    fast.collate_all()
    reference.collate_all()
    timed = time_steps(fast, reference)

    median_seconds = {name: statistics.median(times) for name, times in timed["seconds"].items()}
    return {
        **timed,
        **_necessary(family, shape, fast, reference, timed["seconds"]),
        "reducer": repr(shape.reducer),
        "dtype": arguments.dtype,
        "rows": batch_size,
        "micro": micro,
        "tokens": tokens,
        "gradient_difference": difference,
        "few_rows_difference": few_differences,
        "weight_bytes": weight_memory(family),
        "first_step_s": lap.seconds["first step"],
        "tenth_minutes": {
            name: TENTH / batch_size * seconds / 60 for name, seconds in median_seconds.items()
        },
    }


def _necessary(
    family: Family,
    shape: Shape,
    fast: EnginePath,
    reference: EnginePath,
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Compare what ran with what the gradient needs."""
    # Tokens and operations that the gradient needs, by step.
    batches = fast.batches
    num_visual = family.num_image_tokens(shape.reducer)
    num_tokens = 0
    flops = []
    for numbers in batches.examples_by_step.tolist():
        examples = [batches.batcher.examples[number] for number in numbers]
        num_tokens += sum(necessary_tokens(example, num_visual) for example in examples)
        flops.append(necessary_flops(family, shape.reducer, examples))

    # MFU is the necessary operations per second, as a share of what the device can do.
    peak, peak_from = peak_flops(fast.device, family.model.dtype)
    micro_batch = fast.collated[0][0]
    assert isinstance(micro_batch, PackedBatch)
    return {
        "slots_per_necessary": {
            "reference": reference.num_slots / num_tokens,
            "fast": fast.num_slots / num_tokens,
        },
        "necessary_flops": statistics.mean(flops),
        "peak_flops": peak,
        "peak_flops_from": peak_from,
        "mfu": rates([count / peak for count in flops], seconds),
        "kept_widths": kept_widths(family, micro_batch, fast.loss.prefix, fast.device),
    }


def _cell(value: float | Mapping[str, float] | None, form: str, scale: float) -> str:
    """Write a figure, or a spread as "median (least to most)"."""
    # Peak memory is not known on every system.
    if value is None:
        return ""
    if isinstance(value, Mapping):
        median, least, most = (format(scale * value[name], form) for name in ("median", "least", "most"))
        return f"{median} ({least} to {most})"
    return format(scale * value, form)


def print_step(name: str, figures: Mapping[str, Any]) -> None:
    """Print the table of a model."""
    title = f"{name}, {figures['reducer']}, {figures['dtype']}, {figures['rows']} examples a step"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for path in PATHS:
        table.add_column(path, justify="right")

    def add(label: str, values: Mapping[str, Any], form: str, *, scale: float = 1.0) -> None:
        table.add_row(label, *(_cell(values[path], form, scale) for path in PATHS))

    add("steps/s (least to most)", figures["steps_per_s"], ".3g")
    add("real tokens/s", figures["tokens_per_s"], ",.0f")
    add("token slots / necessary tokens", figures["slots_per_necessary"], ".2f")
    add("necessary operations / peak (MFU)", figures["mfu"], ".1%")
    add("memory beside the weights, GB", figures["peak_bytes"], ".2f", scale=1e-9)
    if name != "tiny":
        add("the whole tenth, from these steps, minutes", figures["tenth_minutes"], ",.1f")

    # The stages of one step, below the figures of all steps.
    for stage in STAGES:
        add(f"  {stage}, s", {path: figures["stage_s"][path][stage] for path in PATHS}, ".3f")

    ratio = figures["ratio"]
    few_errors = [f"{error:.1e} in {dtype}" for dtype, error in figures["few_rows_difference"].items()]
    print_table(
        table,
        f"fast / reference: {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})",
        f"gradients differ by {figures['gradient_difference']:.1e} in {figures['dtype']}, "
        f"those of a few examples through {FEW_LAYERS} layers by {' and '.join(few_errors)}",
        f"necessary: {figures['necessary_flops'] / 1e12:,.2f} TFLOP a step; "
        f"peak {figures['peak_flops'] / 1e12:,.2f} TFLOP/s, {figures['peak_flops_from']}",
        f"fast: first step {figures['first_step_s']:.2f} s after the model is made; "
        f"keeps {figures['kept_widths']:.1f} d bytes a token and layer in bf16; "
        f"weights {figures['weight_bytes'] / 1e9:.2f} GB; up to {figures['tokens']:,} tokens a batch",
    )


def parse_bench_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command's arguments, by default those of this process."""
    parser = bench_parser(__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--rows", type=count, help="examples of a step (default: 128, with tiny 64)")
    parser.add_argument(
        "--micro",
        type=count,
        help="examples of a micro batch of the reference (default: 16, with tiny 8)",
    )
    parser.add_argument(
        "--tokens",
        type=count,
        help="tokens of a micro batch of the fast path (default: as many as fit, at most 16,384)",
    )
    arguments = parser.parse_args(words)
    check_gpu(parser, arguments.shape)
    return arguments


@exit_on_user_error
def main() -> None:
    """Measure, print, and write the figures."""
    arguments = parse_bench_arguments()
    device = best_device()
    figures: dict[str, Any] = {"where": where(device), "shapes": {}}
    print_environment(figures["where"])

    for name in arguments.shape:
        figures["shapes"][name] = measure_step(shape_of(name), arguments, device)
        print_step(name, figures["shapes"][name])

        # Write after each model, so that a command that is stopped keeps what it has measured.
        if arguments.json is not None:
            write_json(arguments.json, figures)

        # Free the model before the next one is made.
        gc.collect()


if __name__ == "__main__":
    main()
