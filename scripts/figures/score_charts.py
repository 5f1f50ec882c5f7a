"""Draw the figures about scores: recovery over budgets, and the part that dominant tokens play."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from scripts.figures.charts import BLACK, BLUE, GREEN, GREY, ORANGE, label_axes, new_figure

SERIES = {
    "tuned": ("tuned", BLUE, "o", "-"),
    "elastic": ("tuned for several budgets at once", GREEN, "s", "-"),
    "free": ("training-free", ORANGE, "^", "--"),
    "random": ("random tokens, tuned", GREY, "x", ":"),
}
"""Label, colour, marker and line of each series in a figure over budgets."""
BARS = {
    "full": ("full", BLACK),
    "free": ("training-free", ORANGE),
    "tuned": ("tuned", BLUE),
    "elastic": ("tuned for several budgets at once", GREEN),
    "random": ("random tokens, tuned", GREY),
}
"""Label and colour of each series in a figure of one budget, from left to right."""

Points = Sequence[Mapping[str, Any]]
"""Scores with "series", "num_visual_tokens" and "metrics" (share of correct answers by kind)."""


def draw_recovery(numbers: Mapping[str, Any]) -> Figure:
    """Draw the scores of full and reduced models: over several budgets as lines, at one as bars."""
    budgets = {point["num_visual_tokens"] for point in numbers["points"] if point["series"] != "full"}
    return _draw_bars(numbers) if len(budgets) == 1 else _draw_curves(numbers)


def _correct(numbers: Mapping[str, Any]) -> str:
    """The label of an axis of scores."""
    return f"correct of {numbers['num_questions']} held-out questions, %"


def _percents(points: Points, series: str, kind: str) -> list[float]:
    """The scores of a series, one per seed."""
    return [100 * point["metrics"][kind] for point in points if point["series"] == series]


def _label_bar(axes: Axes, x: float, height: float, text: str, *, upright: bool = False) -> None:
    axes.annotate(
        text,
        (x, height),
        ha="center",
        va="bottom",
        fontsize="small",
        color=GREY if upright else BLACK,
        rotation=90 if upright else 0,
    )


def _draw_bars(numbers: Mapping[str, Any]) -> Figure:
    """Draw a group of bars for each kind of question: full, training-free, tuned, random."""
    points, kinds = numbers["points"], numbers["kinds"]
    present = {point["series"] for point in points}
    shown = [name for name in BARS if name in present or name == "tuned"]
    if "elastic" in present and "tuned" not in present:
        shown.remove("tuned")

    (budget,) = {point["num_visual_tokens"] for point in points if point["series"] != "full"}
    full_tokens = [point["num_visual_tokens"] for point in points if point["series"] == "full"]
    tokens = f"{budget:g} of {full_tokens[0]:g}" if full_tokens else f"{budget:g}"
    width = max(4.8, 1.6 + 0.75 * len(shown) * len(kinds))
    figure = new_figure(width, 4.4, f"Correct answers with {tokens} visual tokens")
    axes = figure.subplots()
    bar_width = 0.8 / len(shown)
    for index, name in enumerate(shown):
        label, colour = BARS[name]
        for group, kind in enumerate(kinds):
            x = group + (index - (len(shown) - 1) / 2) * bar_width
            percents = _percents(points, name, kind)
            if not percents:
                _label_bar(axes, x, 1, "not tuned", upright=True)
                continue
            mean = statistics.mean(percents)
            axes.bar(x, mean, width=0.94 * bar_width, color=colour, label=label if group == 0 else None)
            _label_bar(axes, x, max(percents), f"{mean:.0f}")
            if len(percents) > 1:  # a dot for each seed
                axes.scatter([x] * len(percents), percents, color="white", edgecolor=colour, s=14, zorder=3)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylim(0, 108)
    label_axes(axes, y=_correct(numbers))
    figure.legend(loc="outside lower center", ncols=len(shown), frameon=False, fontsize="small")
    return figure


def _draw_curve(axes: Axes, points: Points, name: str, kind: str) -> None:
    """Draw the means over seeds as a line, and every run as a pale marker."""
    by_tokens: dict[float, list[float]] = {}
    for point in points:
        if point["series"] == name:
            by_tokens.setdefault(point["num_visual_tokens"], []).append(100 * point["metrics"][kind])
    if not by_tokens:
        return

    label, colour, marker, line = SERIES[name]
    tokens = sorted(by_tokens)
    means = [statistics.mean(by_tokens[count]) for count in tokens]
    axes.plot(tokens, means, color=colour, marker=marker, linestyle=line, label=label)
    for count in tokens:
        percents = by_tokens[count]
        axes.scatter([count] * len(percents), percents, color=colour, marker=marker, alpha=0.4, s=16)


def _draw_curves(numbers: Mapping[str, Any]) -> Figure:
    """Draw scores over visual tokens, one panel per kind of question, with a line at the score of full."""
    points, kinds = numbers["points"], numbers["kinds"]
    figure = new_figure(1 + 3.9 * len(kinds), 4.8, "Correct answers over the number of visual tokens")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    counts = sorted({point["num_visual_tokens"] for point in points})
    for axes, kind in zip(panels, kinds, strict=True):
        full = _percents(points, "full", kind)
        if full:
            axes.axhline(full[0], color=BLACK, linewidth=1)
            axes.annotate(" full", (0, full[0]), xycoords=("axes fraction", "data"), va="bottom")
        for name in SERIES:
            _draw_curve(axes, points, name, kind)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(counts[0] / 1.5, counts[-1] * 1.5)
        axes.set_ylim(0, 108)
        axes.set_title(kind, fontsize="medium")
        label_axes(axes, x="visual tokens per question (log scale)")
    panels[0].set_ylabel(_correct(numbers))
    panels[0].legend(loc="lower right", frameon=False, fontsize="small")
    return figure


def draw_without_dominant(numbers: Mapping[str, Any]) -> Figure:
    """Draw bars of training-free and tuned, with both kinds of tokens and without either."""
    kinds, variants = numbers["kinds"], numbers["variants"]
    figure = new_figure(1 + 4.1 * len(kinds), 4.8, "Scores without dominant or contextual tokens")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for index, variant in enumerate(variants):
            _draw_pair(axes, index, variant, kind)
        labels = [f"{each['name']}\n{each['dominant']} + {each['contextual']}" for each in variants]
        axes.set_xticks(range(len(variants)), labels, fontsize="small")
        axes.set_xlim(-0.5, len(variants) - 0.5)
        axes.set_title(kind, fontsize="medium")
        label_axes(axes)
    panels[0].set_ylim(0, 108)
    panels[0].set_ylabel(_correct(numbers))

    handles, names = panels[0].get_legend_handles_labels()
    by_name = dict(zip(names, handles, strict=True))
    figure.legend(
        by_name.values(), by_name, loc="outside lower center", ncols=2, frameon=False, fontsize="small"
    )
    return figure


def _draw_pair(axes: Axes, index: int, variant: Mapping[str, Any], kind: str) -> None:
    """Draw the two bars of a variant: training-free and tuned."""
    for offset, name in ((-0.2, "free"), (0.2, "tuned")):
        x = index + offset
        if variant[name] is None:
            _label_bar(axes, x, 1, "not tuned", upright=True)
            continue
        label, colour = BARS[name]
        percent = 100 * variant[name][kind]
        axes.bar(x, percent, width=0.38, color=colour, label=label)
        _label_bar(axes, x, percent, f"{percent:.0f}")
