"""Draw the paper's analyses from a finished run, or from any supported model: PNG files, and the numbers beside each as JSON.

attention-maps    where the attention of the tapped layer is, in pictures
top-share         how much of the attention to patches the most attended of them hold, by layer
softmax-gradient  the gradient of the softmax against the attention weight, in the tapped layer
kept-tokens       which tokens stay, at several budgets
recovery          full, free, tuned and random over budgets: of the run, and of runs like it beside it or in --runs
without-dominant  with and without dominant tokens: of the ablations' runs where there are some, else training-free, asked here

The last two need a run with held-out questions. Without --figures all are drawn that can be.

python -m scripts.figures.main runs/my-run
python -m scripts.figures.main llava-hf/llava-1.5-7b-hf --pictures cat.jpg street.jpg --out figures
"""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from data.paths import atomic_write, write_json
from scripts.common.held_out import free_row
from scripts.figures import charts
from scripts.figures.attention import num_holding, softmax_gradient, top_shares
from scripts.figures.inputs import FigureInputs, make_subject
from scripts.figures.scores import Score, comparable_scores, same_but_budget, score_of, without_a_part
from train.cli import count, exit_on_user_error, output
from vzip import UserError
from vzip.overlay import attention_map, kept_tokens, look
from vzip.reducers.visionzip import VisionZip, split_budget

NUM_SHOWN = 4
"""Pictures that are shown."""
TOPS = (0.01, 0.05, 0.1, 0.25)
"""Shares of the patches that are the top k."""
TITLED = 2
"""The one of them that the title speaks of."""
MAX_KINDS = 3
"""Kinds of questions that have a panel each; of more, only "all" is shown."""


def _attention_maps(subject: FigureInputs) -> tuple[Figure, dict[str, Any]]:
    family, shown = subject.comparison.family, subject.pictures[:NUM_SHOWN]
    tiles = [
        look(family, subject.reducer, subject.comparison.processor.image_processor, picture)
        for picture in shown
    ]
    found = [layer.shares().cpu() for _, layer in subject.attention[:NUM_SHOWN]]
    numbers = subject.about | {
        "pictures": [
            {
                "holding_half": num_holding(shares, 0.5)[0],
                "most": float(shares.max()),
                "attention": shares[0].tolist(),
            }
            for shares in found
        ]
    }
    return charts.draw_attention_maps(
        numbers, [(tile.picture, attention_map(tile)) for tile in tiles]
    ), numbers


def _top_share(subject: FigureInputs) -> tuple[Figure, dict[str, Any]]:
    about = subject.about
    num_patches = about["num_patches"]
    counts = [max(1, round(share * num_patches)) for share in TOPS]
    by_layer = torch.stack([shares for shares, _ in subject.attention]).transpose(0, 1)
    held = [top_shares(shares, counts) for shares in by_layer]
    lines = [
        {"top": top, "uniform": top / num_patches, "shares": list(shares)}
        for top, shares in zip(counts, zip(*held, strict=True), strict=True)
    ]
    numbers = about | {"titled": TITLED, "lines": lines}
    return charts.draw_top_share(numbers), numbers


def _softmax_gradient(subject: FigureInputs) -> tuple[Figure, dict[str, Any]]:
    numbers = subject.about | softmax_gradient(layer for _, layer in subject.attention)
    return charts.draw_softmax_gradient(numbers), numbers


def _kept_tokens(subject: FigureInputs) -> tuple[Figure, dict[str, Any]]:
    family, processor = subject.comparison.family, subject.comparison.processor
    drawn: list[list[Image.Image]] = [[] for _ in subject.pictures[:NUM_SHOWN]]
    budgets = []
    for budget in subject.shown_budgets:
        reducer, held = subject.with_budget(budget), []
        family.check_reducer(reducer)
        for pictures, picture in zip(drawn, subject.pictures, strict=False):
            tile = look(family, reducer, processor.image_processor, picture)
            pictures += [kept_tokens(tile)] if pictures else [tile.picture, kept_tokens(tile)]
            held.append(float(tile.saliency.flatten()[tile.dominant].sum() / tile.saliency.sum()))
        parts = {"dominant": reducer.dominant, "contextual": reducer.contextual}
        budgets.append({"budget": budget, **parts, "attention": statistics.mean(held)})
    numbers = {"num_patches": family.num_patches, "has_cls": family.has_cls, "budgets": budgets}
    return charts.draw_kept_tokens(numbers, drawn), numbers


def _run_scores(subject: FigureInputs) -> list[Score]:
    """Raises UserError where there is no finished run, or one that asked nothing."""
    if subject.run is None:
        raise UserError("this figure shows scores, which only a finished run has; give its folder")
    if not (scores := comparable_scores(subject.run, subject.others)):
        raise UserError(
            f"{subject.run} has no scores: data.held_out was not set, or evaluate.questions was 0"
        )
    return scores


def _free(subject: FigureInputs, reducer: VisionZip) -> Score:
    """Asked here, on the run's held-out questions."""
    assert subject.run is not None
    name = f"free-{reducer.dominant}-{reducer.contextual}"
    row = free_row(subject.run, subject.comparison, reducer, name=name, folder=subject.folder)
    return score_of(row, series="free", reducer=reducer, run=str(subject.folder))


def _of_questions(scores: Sequence[Score]) -> dict[str, Any]:
    kinds = list(scores[0].metrics)
    return {"kinds": kinds if len(kinds) <= MAX_KINDS else ["all"], "num_questions": scores[0].num_questions}


def _recovery(subject: FigureInputs) -> tuple[Figure, dict[str, Any]]:
    scores = same_but_budget(_run_scores(subject), subject.reducer)
    for budget in subject.budgets:
        reducer = subject.with_budget(budget)
        if not any(score.series == "free" and score.reducer == reducer for score in scores):
            scores.append(_free(subject, reducer))
    if not scores:
        raise UserError(
            f"{subject.run} has no row of VisionZip, of all or of random tokens; ask `free` at some: --budgets 4 8 16"
        )
    if len({score.num_visual_tokens for score in scores if score.series != "full"}) == 1:
        print(
            "recovery: there is one budget alone; tune others (BUDGET=...), or ask `free` at some: --budgets 4 8 16"
        )
    names = ("series", "num_visual_tokens", "seed", "run", "metrics")
    points = [{name: getattr(score, name) for name in names} for score in scores]
    numbers = _of_questions(scores) | {"points": points}
    return charts.draw_recovery(numbers), numbers


def _mean(metrics: Iterable[Mapping[str, float]]) -> dict[str, float] | None:
    """Over seeds; None of nothing."""
    given = list(metrics)
    return {kind: statistics.mean(each[kind] for each in given) for kind in given[0]} if given else None


def _without_dominant(subject: FigureInputs) -> tuple[Figure, dict[str, Any]]:
    scores, reducer = _run_scores(subject), subject.reducer
    dominant, contextual = split_budget(reducer.dominant + reducer.contextual)
    variants = []
    for name, variant in without_a_part(replace(reducer, dominant=dominant, contextual=contextual)).items():
        own = [score for score in scores if score.reducer == variant]
        if not any(score.series == "free" for score in own):
            own.append(_free(subject, variant))
        found = {
            series: _mean(score.metrics for score in own if score.series == series)
            for series in ("free", "tuned")
        }
        variants.append(
            {"name": name, "dominant": variant.dominant, "contextual": variant.contextual, **found}
        )
    numbers = _of_questions(scores) | {"variants": variants}
    return charts.draw_without_dominant(numbers), numbers


FIGURES: dict[str, Callable[[FigureInputs], tuple[Figure, dict[str, Any]]]] = {
    "attention-maps": _attention_maps,
    "top-share": _top_share,
    "softmax-gradient": _softmax_gradient,
    "kept-tokens": _kept_tokens,
    "recovery": _recovery,
    "without-dominant": _without_dominant,
}


def draw_figures(subject: FigureInputs, name: str) -> Path:
    """Write NAME.png and NAME.json, each whole or not at all: the path of the PNG. Raises UserError as the figure does."""
    figure, numbers = FIGURES[name](subject)
    path = subject.folder / f"{name}.png"
    with output("--out", path):
        with atomic_write(path) as scratch:
            figure.savefig(scratch, format="png", dpi=120)
        write_json(path.with_suffix(".json"), numbers)
    return path


@exit_on_user_error
def main() -> None:
    """Draw what was asked for, or all that can be drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder of a finished run; or folder or hub id of a model")
    parser.add_argument("--figures", nargs="+", default=[], help=", ".join(FIGURES))
    parser.add_argument(
        "--pictures", nargs="+", type=Path, default=[], help="by default the run's held-out ones"
    )
    parser.add_argument(
        "--budgets", nargs="+", type=count, default=[], help="of kept-tokens, and of `free` in recovery"
    )
    parser.add_argument(
        "--runs", nargs="+", type=Path, default=[], help="folders of other runs to compare with"
    )
    parser.add_argument("--out", type=Path, help="folder of the figures, by default RUN/figures")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.figures if name not in FIGURES]:
        raise UserError(f"--figures {unknown[0]} does not exist; choose among: {', '.join(FIGURES)}")
    subject, made = make_subject(arguments), []
    for name in arguments.figures or FIGURES:
        try:
            made.append(draw_figures(subject, name))
            print(made[-1])
        except UserError as error:
            if arguments.figures:
                raise
            print(f"{name} is left out: {error}")
    if not made:
        raise UserError("no figure could be drawn; the reasons stand above")


if __name__ == "__main__":
    main()
