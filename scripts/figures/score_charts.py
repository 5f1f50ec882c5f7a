"""Draw the figures about scores: recovery over budgets, and the part that dominant tokens play."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from scripts.figures.charts import BLACK, BLUE, GREEN, GREY, ORANGE, label_axes, new_figure

SERIES = {
    "full": ("full", BLACK),
    "free": ("training-free", ORANGE),
    "tuned": ("tuned", BLUE),
    "elastic": ("tuned for several budgets at once", GREEN),
    "random": ("random tokens, tuned", GREY),
}
"""Label and colour of each series, in the order of the bars."""
LINES = {
    "tuned": ("o", "-"),
    "elastic": ("s", "-"),
    "free": ("^", "--"),
    "random": ("x", ":"),
}
"""Marker and line of each series in a figure over budgets, in the order of the legend."""

Points = Sequence[Mapping[str, Any]]
"""Scores with "series", "num_visual_tokens" and "metrics" (share of correct answers by kind)."""


def draw_recovery(numbers: Mapping[str, Any]) -> Figure:
    """Draw the scores of full and reduced models: over several budgets as lines, at one as bars."""
    budgets = set()
    for point in numbers["points"]:
        # Full keeps all tokens, so it has no budget.
        if point["series"] != "full":
            budgets.add(point["num_visual_tokens"])
    return _draw_bars(numbers) if len(budgets) == 1 else _draw_curves(numbers)


def _correct(numbers: Mapping[str, Any]) -> str:
    """Label an axis of scores."""
    return f"correct of {numbers['num_questions']} held-out questions, %"


def _percents(points: Points, series: str, kind: str) -> list[float]:
    """List the scores of a series in per cent, one per seed."""
    return [100 * point["metrics"][kind] for point in points if point["series"] == series]


def _num_tokens(points: Points) -> str:
    """Name the visual tokens of a figure with a single budget, such as "8 of 64"."""
    # All reduced series have the same number here, so any point gives it.
    full = ""
    reduced = ""
    for point in points:
        count = f"{point['num_visual_tokens']:g}"
        if point["series"] == "full":
            full = f" of {count}"
        else:
            reduced = count
    return reduced + full


def _draw_bar(axes: Axes, x: float, width: float, series: str, percents: Sequence[float]) -> None:
    """Draw the mean over seeds as a bar with its number on top, or say that nothing was tuned."""
    # Without the words, a missing bar would look like a score of 0.
    if not percents:
        axes.annotate("not tuned", (x, 1), ha="center", va="bottom", color=GREY, rotation=90)
        return

    _, colour = SERIES[series]
    mean = statistics.mean(percents)
    axes.bar(x, mean, width=0.94 * width, color=colour)

    # The number stands above the best seed, so that no dot covers it.
    axes.annotate(
        f"{mean:.0f}",
        (x, max(percents)),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize="small",
    )

    # Draw each of several seeds as a dot on the bar, to show how far they spread.
    if len(percents) > 1:
        x_of_dots = [x] * len(percents)
        axes.scatter(x_of_dots, percents, color="white", edgecolor=colour, s=14, zorder=3)


def _add_legend(figure: Figure, series: Sequence[str]) -> None:
    """Explain the colours of bars below the figure."""
    patches = []
    for name in series:
        label, colour = SERIES[name]
        patches.append(Patch(color=colour, label=label))
    figure.legend(
        handles=patches, loc="outside lower center", ncols=len(series), frameon=False, fontsize="small"
    )


def _draw_bars(numbers: Mapping[str, Any]) -> Figure:
    """Draw a group of bars for each kind of question: full, training-free, tuned, random."""
    points = numbers["points"]
    kinds = numbers["kinds"]
    measured = {point["series"] for point in points}

    # Always show a place for "tuned", even if nothing was tuned. Other series need a score.
    if "elastic" not in measured:
        measured.add("tuned")
    shown = [name for name in SERIES if name in measured]

    # Each bar needs room for its number, so the figure grows with the bars.
    figure_width = max(4.8, 1.6 + 0.75 * len(shown) * len(kinds))
    figure = new_figure(figure_width, 4.4, f"Correct answers with {_num_tokens(points)} visual tokens")
    axes = figure.subplots()

    # Groups stand at 0, 1, 2, ...; the bars of a group take 0.8 of the room between two groups.
    width = 0.8 / len(shown)
    for group, kind in enumerate(kinds):
        left = group - 0.4 + width / 2
        for index, name in enumerate(shown):
            percents = _percents(points, name, kind)
            _draw_bar(axes, left + index * width, width, name, percents)

    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_ylim(0, 108)
    label_axes(axes, y=_correct(numbers))
    _add_legend(figure, shown)
    return figure


def _draw_curve(axes: Axes, points: Points, name: str, kind: str) -> None:
    """Draw the means over seeds as a line, and every run as a pale marker."""
    # Runs with the same number of tokens differ in their seeds.
    by_tokens: dict[float, list[float]] = {}
    for point in points:
        if point["series"] == name:
            percents = by_tokens.setdefault(point["num_visual_tokens"], [])
            percents.append(100 * point["metrics"][kind])
    if not by_tokens:
        return

    label, colour = SERIES[name]
    marker, line = LINES[name]
    tokens = sorted(by_tokens)
    means = [statistics.mean(by_tokens[count]) for count in tokens]
    axes.plot(tokens, means, color=colour, marker=marker, linestyle=line, label=label)
    for count, percents in by_tokens.items():
        axes.scatter([count] * len(percents), percents, color=colour, marker=marker, alpha=0.4, s=16)


def _draw_curves(numbers: Mapping[str, Any]) -> Figure:
    """Draw scores over visual tokens, one panel per kind of question, with a line for full."""
    points = numbers["points"]
    kinds = numbers["kinds"]
    figure = new_figure(1 + 3.9 * len(kinds), 4.8, "Correct answers over visual tokens")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    counts = sorted({point["num_visual_tokens"] for point in points})
    for axes, kind in zip(panels, kinds, strict=True):
        # Full is tuned for nothing, so every run has the same score of it.
        full = _percents(points, "full", kind)
        if full:
            axes.axhline(full[0], color=BLACK, linewidth=1)
            axes.annotate(" full", (0, full[0]), xycoords=("axes fraction", "data"), va="bottom")
        for name in LINES:
            _draw_curve(axes, points, name, kind)

        # Budgets double from one to the next, so a logarithmic axis spaces them equally.
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
    kinds = numbers["kinds"]
    variants = numbers["variants"]
    figure = new_figure(1 + 4.1 * len(kinds), 4.8, "Scores without dominant or contextual tokens")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        labels = []
        for index, variant in enumerate(variants):
            labels.append(f"{variant['name']}\n{variant['dominant']} + {variant['contextual']}")

            # Two bars side by side: training-free on the left, tuned on the right.
            for offset, name in ((-0.2, "free"), (0.2, "tuned")):
                metrics = variant[name]
                percents = [] if metrics is None else [100 * metrics[kind]]
                _draw_bar(axes, index + offset, 0.4, name, percents)

        axes.set_xticks(range(len(variants)), labels, fontsize="small")
        axes.set_xlim(-0.5, len(variants) - 0.5)
        axes.set_title(kind, fontsize="medium")
        label_axes(axes)

    panels[0].set_ylim(0, 108)
    panels[0].set_ylabel(_correct(numbers))
    _add_legend(figure, ["free", "tuned"])
    return figure
