"""Draw the paper's analyses of a finished run or a model, as PNG files with their numbers (JSON).

attention-maps    where the attention of VisionZip's layer goes, in pictures
top-share         how much of the attention the most attended patches hold, by layer
softmax-gradient  the gradient of the softmax against the attention weight, in VisionZip's layer
kept-tokens       which tokens stay, at several budgets
recovery          scores of full, training-free, tuned and random, over budgets or as bars
without-dominant  scores with and without dominant tokens, of ablation runs or training-free

The last two need a run with held-out questions. They also show similar runs, which lie beside it or
are named in --runs. Without --figures, every figure is drawn for which there is enough.

make figures RUN=runs/my-run ARGS="--figures kept-tokens --pictures cat.jpg street.jpg"
python -m scripts.figures.main llava-hf/llava-1.5-7b-hf --pictures cat.jpg street.jpg --out figures
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from scripts.common.held_out import ask_training_free
from scripts.figures.attention import num_holding, softmax_gradient, top_shares
from scripts.figures.charts import (
    draw_attention_maps,
    draw_kept_tokens,
    draw_softmax_gradient,
    draw_top_share,
)
from scripts.figures.inputs import FigureInputs, figure_inputs
from scripts.figures.score_charts import draw_recovery, draw_without_dominant
from scripts.figures.scores import Score, comparable_scores, same_but_budget, score_of, without_a_part
from train.cli import count, exit_on_user_error, output
from vzip import UserError
from vzip.files import atomic_write, write_json
from vzip.overlay import attention_map, kept_tokens, look
from vzip.reducers.visionzip import VisionZip, split_budget

NUM_SHOWN = 4
"""Pictures that are shown."""
TOPS = (0.01, 0.05, 0.1, 0.25)
"""The top k of `top-share`, as shares of all patches."""
MAX_KINDS = 3
"""Kinds of questions that are shown one by one. If there are more, only "all" is shown."""

Drawing = tuple[Figure, dict[str, Any]]
"""A figure and its numbers."""


def attention_maps(inputs: FigureInputs) -> Drawing:
    """Draw where the attention of VisionZip's layer goes in each picture."""
    # Attention is there for all pictures, but only the first ones are shown.
    drawn = []
    pictures = []
    for picture, (_, layer) in zip(inputs.pictures[:NUM_SHOWN], inputs.attention, strict=False):
        tile = look(inputs.family, inputs.reducer, inputs.image_processor, picture)
        drawn.append((tile.picture, attention_map(tile)))

        # The numbers are shares of the patches alone, without the attention of CLS to itself.
        shares = layer.shares().cpu()
        pictures.append(
            {
                "holding_half": num_holding(shares, 0.5)[0],
                "most": float(shares.max()),
                "attention": shares[0].tolist(),
            }
        )
    numbers = inputs.about | {"pictures": pictures}
    return draw_attention_maps(numbers, drawn), numbers


def top_share(inputs: FigureInputs) -> Drawing:
    """Draw the share of the attention on the top k patches, in each layer."""
    # "uniform" is the share that k patches would hold if all patches got the same.
    num_patches = inputs.about["num_patches"]
    counts = [max(1, round(share * num_patches)) for share in TOPS]
    lines = [{"top": count, "uniform": count / num_patches, "shares": []} for count in counts]

    # From pictures with layers to layers with pictures, so that each layer is a mean over pictures.
    by_layer = torch.stack([shares for shares, _ in inputs.attention]).transpose(0, 1)
    for shares in by_layer:
        for line, share in zip(lines, top_shares(shares, counts), strict=True):
            line["shares"].append(share)
    numbers = inputs.about | {"lines": lines}
    return draw_top_share(numbers), numbers


def softmax_gradients(inputs: FigureInputs) -> Drawing:
    """Draw the gradient of the softmax in VisionZip's layer."""
    numbers = inputs.about | softmax_gradient(layer for _, layer in inputs.attention)
    return draw_softmax_gradient(numbers), numbers


def kept_at_budgets(inputs: FigureInputs) -> Drawing:
    """Draw the tokens that remain of each picture, at several budgets."""
    family = inputs.family
    shown = inputs.pictures[:NUM_SHOWN]
    drawn: list[list[Image.Image]] = [[] for _ in shown]
    budgets = []
    for budget in inputs.shown_budgets:
        reducer = inputs.with_budget(budget)
        family.check_reducer(reducer)
        attention = []
        for index, picture in enumerate(inputs.pictures):
            # The share of the attention on the dominant patches. All pictures count in the mean.
            tile = look(family, reducer, inputs.image_processor, picture)
            dominant = tile.saliency.flatten()[tile.dominant]
            attention.append(float(dominant.sum() / tile.saliency.sum()))

            # Show only the first ones: the input once, and then the kept tokens at each budget.
            if index < len(shown):
                if not drawn[index]:
                    drawn[index].append(tile.picture)
                drawn[index].append(kept_tokens(tile))
        budgets.append(
            {
                "budget": budget,
                "dominant": reducer.dominant,
                "contextual": reducer.contextual,
                "attention": statistics.mean(attention),
            }
        )
    numbers = {"num_patches": family.num_patches, "has_cls": family.has_cls, "budgets": budgets}
    return draw_kept_tokens(numbers, drawn), numbers


def _scores_of_run(inputs: FigureInputs) -> list[Score]:
    """Read the scores of the run and of runs like it.

    Raises UserError if there is no run, or it asked nothing.
    """
    if inputs.run is None:
        raise UserError("this figure shows scores, which only a finished run has; give its folder")
    scores = comparable_scores(inputs.run, inputs.others)
    if not scores:
        raise UserError(f"{inputs.run} has no scores: data.held_out was not set, or evaluate.questions was 0")
    return scores


def _training_free(inputs: FigureInputs, reducer: VisionZip) -> Score:
    """Ask the run's held-out questions now, training-free with any reducer."""
    assert inputs.run is not None
    row = ask_training_free(
        inputs.run,
        inputs.comparison,
        reducer,
        name=f"free-{reducer.dominant}-{reducer.contextual}",
        folder=inputs.folder,
    )
    return score_of(row, series="free", reducer=reducer, run=str(inputs.folder))


def _about_questions(scores: Sequence[Score]) -> dict[str, Any]:
    # All scores are of the same questions, so the first one tells their kinds.
    kinds = list(scores[0].metrics)
    if len(kinds) > MAX_KINDS:
        kinds = ["all"]
    return {"kinds": kinds, "num_questions": scores[0].num_questions}


def recovery(inputs: FigureInputs) -> Drawing:
    """Draw the scores of full, training-free, tuned and random over budgets."""
    scores = same_but_budget(_scores_of_run(inputs), inputs.reducer)

    # Budgets that no run was made for are asked now, training-free.
    for budget in inputs.budgets:
        reducer = inputs.with_budget(budget)
        if not any(score.series == "free" and score.reducer == reducer for score in scores):
            scores.append(_training_free(inputs, reducer))
    if not scores:
        raise UserError(
            f"{inputs.run} has no score with VisionZip, with all tokens or with random ones; "
            f"ask training-free at some budgets: --budgets 4 8 16"
        )
    # Full has no budget of its own, so it does not make a curve.
    if len({score.num_visual_tokens for score in scores if score.series != "full"}) == 1:
        print(
            "recovery: there is a single budget, shown as bars; for curves tune more (BUDGET=...), "
            "or ask training-free at some: --budgets 4 8 16"
        )

    # The JSON file keeps each score with its run, so that the figure can be drawn again elsewhere.
    points = []
    for score in scores:
        points.append(
            {
                "series": score.series,
                "num_visual_tokens": score.num_visual_tokens,
                "seed": score.seed,
                "run": score.run,
                "metrics": score.metrics,
            }
        )
    numbers = _about_questions(scores) | {"points": points}
    return draw_recovery(numbers), numbers


def _mean_over_seeds(scores: Sequence[Score], series: str) -> dict[str, float] | None:
    """Average each metric of a series. None if the series has no score."""
    by_kind: dict[str, list[float]] = {}
    for score in scores:
        if score.series == series:
            for kind, share in score.metrics.items():
                by_kind.setdefault(kind, []).append(share)
    return {kind: statistics.mean(shares) for kind, shares in by_kind.items()} or None


def without_dominant(inputs: FigureInputs) -> Drawing:
    """Draw the scores with the paper's split of the budget, and with only one kind of token."""
    # All variants have the same number of tokens. They differ only in how these are split.
    scores = _scores_of_run(inputs)
    dominant, contextual = split_budget(inputs.reducer.dominant + inputs.reducer.contextual)
    split = replace(inputs.reducer, dominant=dominant, contextual=contextual)

    # A variant that no run has scores of is asked now, training-free.
    variants = []
    for name, reducer in without_a_part(split).items():
        own = [score for score in scores if score.reducer == reducer]
        if not any(score.series == "free" for score in own):
            own.append(_training_free(inputs, reducer))
        variants.append(
            {
                "name": name,
                "dominant": reducer.dominant,
                "contextual": reducer.contextual,
                "free": _mean_over_seeds(own, "free"),
                "tuned": _mean_over_seeds(own, "tuned"),
            }
        )
    numbers = _about_questions(scores) | {"variants": variants}
    return draw_without_dominant(numbers), numbers


FIGURES: dict[str, Callable[[FigureInputs], Drawing]] = {
    "attention-maps": attention_maps,
    "top-share": top_share,
    "softmax-gradient": softmax_gradients,
    "kept-tokens": kept_at_budgets,
    "recovery": recovery,
    "without-dominant": without_dominant,
}


def write_figure(inputs: FigureInputs, name: str) -> Path:
    """Write NAME.png and NAME.json, each whole or not at all. Returns the path of the PNG.

    Raises:
        UserError: the figure can't be drawn, or not written.
    """
    figure, numbers = FIGURES[name](inputs)
    path = inputs.folder / f"{name}.png"

    # Nothing is written before the figure is complete.
    with output("--out", path):
        with atomic_write(path) as scratch:
            figure.savefig(scratch, format="png", dpi=120)
        write_json(path.with_suffix(".json"), numbers)
    return path


def _figures_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder of a finished run; or folder or hub id of a model")
    parser.add_argument("--figures", nargs="+", default=[], help=", ".join(FIGURES))
    parser.add_argument(
        "--pictures", nargs="+", type=Path, default=[], help="by default pictures of held-out questions"
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=count,
        default=[],
        help="budgets of kept-tokens; recovery asks training-free at each of them",
    )
    parser.add_argument(
        "--runs", nargs="+", type=Path, default=[], help="folders of other runs to compare with"
    )
    parser.add_argument("--out", type=Path, help="folder of the figures, by default RUN/figures")
    return parser


@exit_on_user_error
def main() -> None:
    """Draw the figures that are named, or all that can be drawn."""
    # Check the names before a model is loaded, which takes long.
    arguments = _figures_parser().parse_args()
    for name in arguments.figures:
        if name not in FIGURES:
            raise UserError(f"--figures {name} does not exist; choose among: {', '.join(FIGURES)}")

    inputs = figure_inputs(arguments)
    num_drawn = 0
    for name in arguments.figures or FIGURES:
        try:
            print(write_figure(inputs, name))
            num_drawn += 1
        except UserError as error:
            # A figure that the user named must be drawn. Without --figures, leave it out.
            if arguments.figures:
                raise
            print(f"{name} is left out: {error}")
    if not num_drawn:
        raise UserError("no figure could be drawn; the reasons stand above")


if __name__ == "__main__":
    main()
