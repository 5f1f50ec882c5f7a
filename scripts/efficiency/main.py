"""Measure what a reducer saves: prefill, time to first token, KV cache and memory.

make efficiency RUN=runs/my-run ARGS="--batch 8"
python -m scripts.efficiency.main runs/my-run --batch 8
python -m scripts.efficiency.main llava-hf/llava-1.5-7b-hf --budget 64
python -m scripts.efficiency.main runs/llava-13b --against llava-hf/llava-1.5-7b-hf

A run is measured tuned, a model training-free, and both are compared with full. Prefill and the
time to the first token are measured on a batch that holds the first question BATCH times. Then
all questions are answered from their files, with the same number of tokens in each setting. The
settings take turns, and the table shows medians. If the run has LoRA, it is part of every prefill.

The column "by FLOPs" is the ratio of the computed operations (`vzip.cost`: causal attention,
SwiGLU, the head and, from the pixels, the vision tower). The column "paper" is the ratio by the
paper's formula for the prefill of a language model.

The questions are the run's held-out questions, with one picture each. A model, or a run without
such questions, is asked about noise.
"""

import argparse
from pathlib import Path

from scripts.common.prefill import TimingPlan
from scripts.common.timing import where
from scripts.efficiency.measure import EfficiencySetting, measure_settings
from scripts.efficiency.questions import held_out_pictures, made_up_questions
from scripts.efficiency.table import print_efficiency
from train.cli import count, exit_on_user_error, output
from train.hardware import best_device
from train.runs import FinishedRun
from vzip import Comparison
from vzip.files import write_json


def parse_efficiency_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="folder of a finished run, or folder or hub id of a model")
    add("--against", help="another run or model, whose setting full is measured too")
    add("--budget", type=count, help="budget of the reducer (default: the run's first)")
    add("--batch", type=count, default=1, help="questions in a batch")
    add("--questions", type=count, default=50, help="ask at most so many questions")
    add("--new-tokens", type=count, default=8, help="tokens of each answer")
    add("--rounds", type=count, default=5, help="measure so often, and show the median")
    add("--json", type=Path, help="file for all figures (default: RUN/efficiency.json)")
    return parser.parse_args()


def _open_settings(
    arguments: argparse.Namespace, comparison: Comparison, *, reduced: str
) -> dict[str, EfficiencySetting]:
    """Open the settings to measure, by their name in the table."""
    # `full` has no budget, so --budget is for the reduced setting alone.
    settings = {
        "full": EfficiencySetting(comparison, "full", budget=None),
        reduced: EfficiencySetting(comparison, reduced, budget=arguments.budget),
    }
    if arguments.against:
        other = Comparison.open(arguments.against)
        name = f"full of {Path(arguments.against).name}"
        settings[name] = EfficiencySetting(other, "full", budget=None)

    return settings


@exit_on_user_error
def main() -> None:
    """Measure, then print and write the figures."""
    arguments = parse_efficiency_arguments()
    device = best_device()
    source = Path(arguments.source)
    is_run = FinishedRun(source).has_settings

    # Look for the data first: loading the model takes minutes.
    held_out = held_out_pictures(source, arguments.questions) if is_run else []

    print(f"loading {arguments.source}", flush=True)
    # Noise comes in the size of the model's tiles, so it needs the model.
    comparison = Comparison.open(arguments.source)
    questions = held_out or made_up_questions(comparison.family, arguments.questions)

    # A model without a tuned projector is measured training-free.
    reduced = "tuned" if "tuned" in comparison.rows else "free"
    settings = _open_settings(arguments, comparison, reduced=reduced)

    # Say what is measured before the measurement starts, because it takes minutes.
    environment = where(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    kind = "of the run's held-out questions" if held_out else "questions about noise"
    print(f"measuring {', '.join(settings)} with {len(questions)} {kind}", flush=True)

    plan = TimingPlan(new_tokens=arguments.new_tokens, rounds=arguments.rounds, device=device)
    figures = {
        "where": environment,
        "source": arguments.source,
        "reduced": reduced,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "num_questions": len(questions),
        "made_up_questions": not held_out,
        "new_tokens": arguments.new_tokens,
        "rows": measure_settings(settings, questions, batch=arguments.batch, plan=plan),
    }
    print_efficiency(figures)

    # A model has no folder of its own, so its figures are written only if --json names a file.
    path = arguments.json
    if path is None and is_run:
        path = source / "efficiency.json"
    if path is not None:
        with output("--json", path):
            write_json(path, figures)
        print(f"all figures: {path}")


if __name__ == "__main__":
    main()
