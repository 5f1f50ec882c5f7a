"""Measure what a reduced model saves: a finished run's row `tuned` against `full`, or `free` of any supported model.

Prefill and the time to the first token are those of the first question, prefilled BATCH times; all questions are answered from
their files to the last token, with the same number of tokens in each row. Rows take turns, the device is waited for, and
medians are shown. "by FLOPs" is the ratio of what is computed (`vzip.cost`: causal attention, SwiGLU, the head, and, from the
pixels, the tower), "paper" the one that the paper's formula of a language model's prefill gives. The questions are the run's
held-out ones, with one picture each; a model, or a run without them, is asked about noise. LoRA, if there is, takes part in
every prefill.

python -m scripts.efficiency runs/my-run --batch 1 --questions 50
python -m scripts.efficiency runs/llava-13b --against llava-hf/llava-1.5-7b-hf    # the large model reduced, the small one full
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from data.paths import write_json
from scripts.common.prefill import Prefill, TimingPlan, measure_prefill
from scripts.common.held_out import with_pictures
from scripts.common.timing import alternating, peak_memory, where
from train.cli import count, exit_on_user_error, output
from train.hardware import best_device
from vzip import Comparison
from vzip.cost import weight_memory
from vzip.families import Family
from vzip.pictures import open_picture
from vzip.templates.encode import IMAGE

MEBIBYTE = 2**20


@dataclass(frozen=True)
class PrefillQuestion:
    """A picture and what is asked about it."""

    text: str
    picture: Path | Image.Image
    """Noise, or a file, which is opened each time it is asked about."""

    def image(self) -> Image.Image:
        return open_picture(self.picture) if isinstance(self.picture, Path) else self.picture


def prefill_questions(run: Path, limit: int) -> list[PrefillQuestion]:
    """The first question of each of the first held-out rows with a picture. Raises UserError if the run's data is gone."""
    rows = with_pictures(run)[:limit]
    return [PrefillQuestion(row.turns[0][0].replace(IMAGE, "").strip(), picture) for row, picture in rows]


def made_up_questions(family: Family, limit: int) -> list[PrefillQuestion]:
    """About noise, square, and large enough to be cut into tiles by a model that does so."""
    generator, side = np.random.default_rng(0), 2 * family.tile_side
    pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return [
        PrefillQuestion(f"What do you see in picture {number}?", Image.fromarray(pixels))
        for number in range(1, limit + 1)
    ]


def prompts(processor: Any, questions: Sequence[PrefillQuestion]) -> list[str]:
    """The questions in the model's chat template, or, without one, behind their placeholder."""
    if not processor.chat_template:
        return [f"{processor.image_token}\n{question.text}" for question in questions]
    contents = [[{"type": "image"}, {"type": "text", "text": question.text}] for question in questions]
    return [
        processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        for content in contents
    ]


class EfficiencySetting:
    """A model in one row of the results, as it is measured.

    Args:
        comparison: the model.
        name: "full", "free" or "tuned".
        budget: of the reducer, by default the run's first.

    Raises:
        UserError: no such row, or a budget that it can't have.
    """

    def __init__(self, comparison: Comparison, name: str, *, budget: int | None) -> None:
        self.comparison, self.name, self.budget = comparison, name, budget
        self.reducer = comparison.reducer(name, budget=budget)

    def inputs(self, model: Any, processor: Any, questions: Sequence[PrefillQuestion]) -> Any:
        """The model's arguments for the questions, padded on the left."""
        images = [question.image() for question in questions]
        padding = {"padding": True, "padding_side": "left"}
        return processor(
            text=prompts(processor, questions), images=images, return_tensors="pt", **padding
        ).to(model.device, model.dtype)

    def prefill(self, question: PrefillQuestion, *, batch: int) -> Prefill:
        """The question, `batch` times."""
        with self.comparison.row(self.name, budget=self.budget) as (model, processor):
            inputs = self.inputs(model, processor, [question] * batch)
        return Prefill(self.comparison.family, self.reducer, inputs)

    @torch.no_grad()
    def answer(self, questions: Sequence[PrefillQuestion], *, batch: int, new_tokens: int) -> list[list[int]]:
        """The ids of exactly `new_tokens` tokens that answer each question."""
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        answers: list[list[int]] = []
        with self.comparison.row(self.name, budget=self.budget) as (model, processor):
            tokenizer = processor.tokenizer
            pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            for start in range(0, len(questions), batch):
                inputs = self.inputs(model, processor, questions[start : start + batch])
                answers += model.generate(**inputs, **length, pad_token_id=pad)[:, -new_tokens:].tolist()
        return answers


def paper_flops(config: Any, num_tokens: int) -> int:
    """FLOPs of a language model's prefill, T (4 n d^2 + 2 n^2 d + 2 n d m), of n tokens in T layers of width d, inner width m.

    Source: arXiv 2412.04467, section 4.
    """
    width, inner = config.hidden_size, config.intermediate_size
    a_layer = 4 * num_tokens * width**2 + 2 * num_tokens**2 * width + 2 * num_tokens * width * inner
    return int(config.num_hidden_layers * a_layer)


def measure_rows(
    rows: Mapping[str, EfficiencySetting],
    questions: Sequence[PrefillQuestion],
    *,
    batch: int,
    settings: TimingPlan,
) -> dict[str, dict[str, Any]]:
    """The figures of each row: those of `scripts.bench.prefill.measure_lengths`, peak memory, and seconds for all questions."""
    cases = {name: row.prefill(questions[0], batch=batch) for name, row in rows.items()}
    found = measure_prefill(cases, settings)
    asking = {
        name: lambda row=row: row.answer(questions, batch=batch, new_tokens=settings.new_tokens)
        for name, row in rows.items()
    }
    seconds = alternating(asking, rounds=settings.rounds, device=settings.device)
    for name, case in cases.items():
        tokens = found[name]["num_visual_tokens"] + found[name]["num_text_tokens"]
        weights, peak = weight_memory(case.family), peak_memory(case.whole, settings.device)
        found[name] |= {
            "reducer": str(case.reducer),
            "paper_flops": paper_flops(case.family.language_model.config, tokens),
            "weight_bytes": weights,
            "peak_bytes": peak,
            "total_bytes": None if peak is None else weights + peak,
            "questions": {"seconds": seconds[name], "median_s": statistics.median(seconds[name])},
        }
    return found


TIMES = {
    "language": ("prefill, language model alone, ms", 1000),
    "whole": ("time to first token, from the pixels, ms", 1000),
    "token": ("each token after it, ms", 1000),
    "questions": ("all questions, s", 1),
}
"""Labels and units of what was timed."""
FORMULAS = {
    "by FLOPs": {"language": "language_flops", "whole": "whole_flops"},
    "paper": {"language": "paper_flops"},
}
"""Columns, and the figure whose ratio they show for what was timed."""
SIZES = {
    "num_visual_tokens": ("visual tokens", 1),
    "kv_bytes": ("KV cache after prefill, MiB", MEBIBYTE),
    "weight_bytes": ("weights, MiB", MEBIBYTE),
    "peak_bytes": ("peak memory above the weights, MiB", MEBIBYTE),
    "total_bytes": ("weights and peak memory, MiB", MEBIBYTE),
}
"""Labels and units of what was counted."""


def _time_cells(found: Mapping[str, Any], reduced: Mapping[str, Any], part: str) -> list[str]:
    """A time; how many times the reduced one it is, with the range over rounds; and that by each formula."""
    _, unit = TIMES[part]
    ratios = [
        time / least for time, least in zip(found[part]["seconds"], reduced[part]["seconds"], strict=True)
    ]
    middle = found[part]["median_s"] / reduced[part]["median_s"]
    by = [
        f"{found[flops[part]] / reduced[flops[part]]:.2f}" if part in flops else ""
        for flops in FORMULAS.values()
    ]
    return [
        f"{unit * found[part]['median_s']:,.4g}",
        f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        *by,
    ]


def _size_cells(found: Mapping[str, Any], reduced: Mapping[str, Any], name: str) -> list[str]:
    """A size, where it is known, and how many times the reduced one it is."""
    none = [""] * len(FORMULAS)
    if found[name] is None:
        return ["", "", *none]
    ratio = f"{found[name] / reduced[name]:.2f}" if reduced[name] > 0 else ""
    return [f"{found[name] / SIZES[name][1]:,.4g}", ratio, *none]


def print_efficiency(figures: Mapping[str, Any]) -> None:
    """Print the table: a column a row of the results, and how many times the reduced row's figure each other one's is."""
    rows, name = figures["rows"], figures["reduced"]
    reduced, others = rows[name], {other: found for other, found in rows.items() if other != name}
    asked = f"{figures['num_questions']} questions, {figures['new_tokens']} new tokens each"
    table = Table(title=f"{figures['source']}, batch {figures['batch']}, {asked}", title_justify="left")
    table.add_column(f"median of {figures['rounds']} rounds", no_wrap=True)
    for column in (name, *(part for other in others for part in (other, f"/ {name} (of rounds)", *FORMULAS))):
        table.add_column(column, justify="right")
    for size, (label, _) in SIZES.items():
        cells = [cell for found in others.values() for cell in _size_cells(found, reduced, size)]
        table.add_row(label, _size_cells(reduced, reduced, size)[0], *cells)
    for part, (label, *_) in TIMES.items():
        cells = [cell for found in others.values() for cell in _time_cells(found, reduced, part)]
        table.add_row(label, _time_cells(reduced, reduced, part)[0], *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder of a finished run; or folder or hub id of a model")
    parser.add_argument("--against", help="another run or model, whose row `full` is measured too")
    parser.add_argument("--budget", type=count, help="by default the run's first; a model needs one")
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--questions", type=count, default=50, help="how many, at most")
    parser.add_argument("--new-tokens", type=count, default=8, help="of each answer")
    parser.add_argument("--rounds", type=count, default=5, help="of which the median is shown")
    parser.add_argument("--json", type=Path, help="file for all figures, by default RUN/efficiency.json")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Measure, print, write."""
    arguments, device = parse(), best_device()
    source = Path(arguments.source)
    is_run = (source / "config.yaml").is_file()
    own = prefill_questions(source, arguments.questions) if is_run else []
    comparison = Comparison.open(arguments.source)
    questions = own or made_up_questions(comparison.family, arguments.questions)
    reduced = "tuned" if "tuned" in comparison.rows else "free"
    rows = {
        name: EfficiencySetting(comparison, name, budget=arguments.budget if name != "full" else None)
        for name in ("full", reduced)
    }
    if arguments.against:
        rows[f"full of {Path(arguments.against).name}"] = EfficiencySetting(
            Comparison.open(arguments.against), "full", budget=None
        )
    settings = TimingPlan(new_tokens=arguments.new_tokens, rounds=arguments.rounds, device=device)
    figures = {
        "where": where(device),
        "source": arguments.source,
        "reduced": reduced,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "num_questions": len(questions),
        "made_up_questions": not own,
        "new_tokens": arguments.new_tokens,
        "rows": measure_rows(rows, questions, batch=arguments.batch, settings=settings),
    }
    print(", ".join(f"{name} {value}" for name, value in figures["where"].items()))
    print("the run's held-out questions" if own else "questions about noise")
    print_efficiency(figures)
    target = arguments.json or (source / "efficiency.json" if is_run else None)
    if target is not None:
        with output("--json", target):
            write_json(target, figures)


if __name__ == "__main__":
    main()
