"""Measure what a reducer saves: prefill, time to first token, KV cache and memory.

make efficiency RUN=runs/my-run                 python -m scripts.efficiency runs/my-run --batch 1
python -m scripts.efficiency llava-hf/llava-1.5-7b-hf --budget 64
python -m scripts.efficiency runs/llava-13b --against llava-hf/llava-1.5-7b-hf

The setting `tuned` of a run, or training-free of a model, is compared with `full`. Prefill and
the time to the first token are measured on the first question, BATCH times in one batch. Then all
questions are answered from their files, with the same number of tokens in each setting. The
settings take turns, and the table shows medians. LoRA, if the run has it, takes part in every
prefill.

The column "by FLOPs" is the ratio of what is computed (`vzip.cost`: causal attention, SwiGLU, the
head and, from the pixels, the vision tower). The column "paper" is the ratio by the paper's formula
for the prefill of a language model.

The questions are the run's held-out questions, with one picture each. A model, or a run without
such questions, is asked about noise.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from data.paths import write_json
from scripts.common.held_out import with_pictures
from scripts.common.prefill import Prefill, TimingPlan, measure_prefill
from scripts.common.timing import alternating, peak_memory, where
from train.cli import count, exit_on_user_error, output
from train.hardware import best_device
from train.runs import FinishedRun
from vzip import Comparison
from vzip.cost import weight_memory
from vzip.families import Family
from vzip.generate import generate_answers
from vzip.pictures import open_picture
from vzip.templates.encode import IMAGE

MEBIBYTE = 2**20


@dataclass(frozen=True)
class PrefillQuestion:
    """A picture and a question about it."""

    text: str
    picture: Path | Image.Image
    """A file, which is opened each time the question is asked; or a picture of noise."""

    def image(self) -> Image.Image:
        """The picture."""
        return open_picture(self.picture) if isinstance(self.picture, Path) else self.picture


def held_out_pictures(run: Path, limit: int) -> list[PrefillQuestion]:
    """The first question of each of the first held-out conversations with a picture.

    Raises:
        UserError: the data of the run is gone.
    """
    questions = []
    for conversation, picture in with_pictures(run)[:limit]:
        text, _ = conversation.turns[0]
        questions.append(PrefillQuestion(text.replace(IMAGE, "").strip(), picture))

    return questions


def made_up_questions(family: Family, limit: int) -> list[PrefillQuestion]:
    """Questions about noise, in a square that a model with tiles cuts into several."""
    side = 2 * family.tile_side
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)

    questions = []
    for number in range(1, limit + 1):
        text = f"What do you see in picture {number}?"
        questions.append(PrefillQuestion(text, Image.fromarray(pixels)))

    return questions


def prompts(processor: Any, questions: Sequence[PrefillQuestion]) -> list[str]:
    """The questions in the model's chat template.

    Without one, a question follows its placeholder.
    """
    if not processor.chat_template:
        return [f"{processor.image_token}\n{question.text}" for question in questions]

    texts = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        conversation = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=True,
        )
        texts.append(text)

    return texts


class EfficiencySetting:
    """A model in one setting, ready to be measured.

    Args:
        comparison: the model.
        name: "full", "free" (training-free) or "tuned".
        budget: budget of the reducer. None for the run's first.

    Raises:
        UserError: the model has no such setting, or not with this budget.
    """

    def __init__(self, comparison: Comparison, name: str, *, budget: int | None) -> None:
        self.comparison = comparison
        self.name = name
        self.budget = budget
        self.reducer = comparison.reducer(name, budget=budget)

    def inputs(self, model: Any, processor: Any, questions: Sequence[PrefillQuestion]) -> Any:
        """The arguments of the model for a batch of questions, padded on the left."""
        inputs = processor(
            text=prompts(processor, questions),
            images=[question.image() for question in questions],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return inputs.to(model.device, model.dtype)

    def prefill(self, question: PrefillQuestion, *, batch: int) -> Prefill:
        """A batch of the same question, `batch` times."""
        with self.comparison.row(self.name, budget=self.budget) as (model, processor):
            inputs = self.inputs(model, processor, [question] * batch)
        return Prefill(self.comparison.family, self.reducer, inputs)

    @torch.no_grad()
    def answer(self, questions: Sequence[PrefillQuestion], *, batch: int, new_tokens: int) -> list[list[int]]:
        """Answer each question, from its file, with exactly `new_tokens` tokens.

        Returns their ids.
        """
        ids = []
        with self.comparison.row(self.name, budget=self.budget) as (model, processor):
            tokenizer = processor.tokenizer
            for start in range(0, len(questions), batch):
                answers = generate_answers(
                    model,
                    tokenizer,
                    self.inputs(model, processor, questions[start : start + batch]),
                    ends=[tokenizer.eos_token_id],
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                )
                ids += [answer.token_ids for answer in answers]

        return ids


def paper_flops(config: Any, num_tokens: int) -> int:
    """FLOPs of a language model's prefill by the paper's formula: T (4 n d^2 + 2 n^2 d + 2 n d m).

    Here n is the number of tokens, T the number of layers, d their width and m the MLPs' width.
    Source: arXiv 2412.04467, section 4.
    """
    width = config.hidden_size
    mlp_width = config.intermediate_size

    projections = 4 * num_tokens * width**2
    attention = 2 * num_tokens**2 * width
    mlp = 2 * num_tokens * width * mlp_width
    return int(config.num_hidden_layers * (projections + attention + mlp))


def measure_settings(
    settings: Mapping[str, EfficiencySetting],
    questions: Sequence[PrefillQuestion],
    *,
    batch: int,
    plan: TimingPlan,
) -> dict[str, dict[str, Any]]:
    """Measure each setting.

    Returns:
        By setting: what `scripts.common.prefill.measure_prefill` returns, FLOPs by the paper's
        formula, memory, and the seconds for all questions.
    """
    cases = {}
    answering = {}
    for name, setting in settings.items():
        cases[name] = setting.prefill(questions[0], batch=batch)
        answering[name] = partial(setting.answer, questions, batch=batch, new_tokens=plan.new_tokens)

    figures = measure_prefill(cases, plan)
    seconds = alternating(answering, rounds=plan.rounds, device=plan.device, title="all questions")

    # Memory comes last: on a CPU, libraries would allocate theirs in the first run.
    for name, case in cases.items():
        own = figures[name]
        num_tokens = own["num_visual_tokens"] + own["num_text_tokens"]
        weights = weight_memory(case.family)
        peak = peak_memory(case.whole, plan.device)
        own |= {
            "reducer": str(case.reducer),
            "paper_flops": paper_flops(case.family.language_model.config, num_tokens),
            "weight_bytes": weights,
            "peak_bytes": peak,
            "total_bytes": None if peak is None else weights + peak,
            "questions": {
                "seconds": seconds[name],
                "median_s": statistics.median(seconds[name]),
            },
        }

    return figures


SIZES = {
    "num_visual_tokens": ("visual tokens", 1),
    "kv_bytes": ("KV cache after prefill, MiB", MEBIBYTE),
    "weight_bytes": ("weights, MiB", MEBIBYTE),
    "peak_bytes": ("peak memory above the weights, MiB", MEBIBYTE),
    "total_bytes": ("weights and peak memory, MiB", MEBIBYTE),
}
"""Labels of the sizes, and what a size is divided by."""
TIMES = {
    "language": ("prefill, language model alone, ms", 1000),
    "whole": ("time to first token, from the pixels, ms", 1000),
    "token": ("each token after it, ms", 1000),
    "questions": ("all questions, s", 1),
}
"""Labels of the times, and what seconds are multiplied by."""
FORMULAS = {
    "by FLOPs": {"language": "language_flops", "whole": "whole_flops"},
    "paper": {"language": "paper_flops"},
}
"""Columns of computed ratios, each with the figure that belongs to a time."""


def _size_line(size: str, reduced: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line of the table: a size in each setting, and its ratio to the reduced one."""
    label, unit = SIZES[size]

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value / unit:,.4g}"

    line = [label, shown(reduced[size])]
    for other in others:
        # On some systems the peak is not known, and a small model may need no memory at all.
        has_ratio = other[size] is not None and reduced[size] > 0
        ratio = f"{other[size] / reduced[size]:.2f}" if has_ratio else ""
        line += [shown(other[size]), ratio]
        line += [""] * len(FORMULAS)

    return line


def _time_line(part: str, reduced: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line of the table: a time in each setting, and its ratios to the reduced one."""
    label, unit = TIMES[part]
    line = [label, f"{unit * reduced[part]['median_s']:,.4g}"]
    for other in others:
        rounds = zip(other[part]["seconds"], reduced[part]["seconds"], strict=True)
        ratios = [seconds / reduced_seconds for seconds, reduced_seconds in rounds]
        ratio = other[part]["median_s"] / reduced[part]["median_s"]

        line.append(f"{unit * other[part]['median_s']:,.4g}")
        line.append(f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        for figures in FORMULAS.values():
            flops = figures.get(part)
            line.append(f"{other[flops] / reduced[flops]:.2f}" if flops else "")

    return line


def print_efficiency(figures: Mapping[str, Any]) -> None:
    """Print the table: a column for each setting, and its figures relative to the reduced one."""
    reduced_name = figures["reduced"]
    reduced = figures["rows"][reduced_name]
    others = {name: row for name, row in figures["rows"].items() if name != reduced_name}

    title = (
        f"{figures['source']}, batch {figures['batch']}, {figures['num_questions']} questions, "
        f"{figures['new_tokens']} new tokens each"
    )
    table = Table(title=title, title_justify="left")
    table.add_column(f"median of {figures['rounds']} rounds", no_wrap=True)
    table.add_column(reduced_name, justify="right")
    for name in others:
        for header in (name, f"/ {reduced_name} (of rounds)", *FORMULAS):
            table.add_column(header, justify="right")

    for size in SIZES:
        table.add_row(*_size_line(size, reduced, list(others.values())))
    for part in TIMES:
        table.add_row(*_time_line(part, reduced, list(others.values())))

    # A log file has no width of its own.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def parse_efficiency_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="folder of a finished run, or folder or hub id of a model")
    add("--against", help="another run or model, which is measured in full too")
    add("--budget", type=count, help="budget of the reducer (default: the run's first)")
    add("--batch", type=count, default=1, help="questions in a batch")
    add("--questions", type=count, default=50, help="most questions that are asked")
    add("--new-tokens", type=count, default=8, help="tokens of each answer")
    add("--rounds", type=count, default=5, help="rounds, whose median is shown")
    add("--json", type=Path, help="file for all figures (default: RUN/efficiency.json)")
    return parser.parse_args()


def _open_settings(
    arguments: argparse.Namespace, comparison: Comparison, *, reduced: str
) -> dict[str, EfficiencySetting]:
    """The settings that are measured, by their name in the table."""
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

    # Missing data is found out before minutes are spent on loading the model.
    held_out = held_out_pictures(source, arguments.questions) if is_run else []

    print(f"loading {arguments.source}", flush=True)
    comparison = Comparison.open(arguments.source)
    questions = held_out or made_up_questions(comparison.family, arguments.questions)
    reduced = "tuned" if "tuned" in comparison.rows else "free"
    settings = _open_settings(arguments, comparison, reduced=reduced)

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

    path = arguments.json
    if path is None and is_run:
        path = source / "efficiency.json"
    if path is not None:
        with output("--json", path):
            write_json(path, figures)
        print(f"all figures: {path}")


if __name__ == "__main__":
    main()
