"""The figures themselves: numbers and pictures in, matplotlib figures out, whose titles say what is seen in them.

Colours are those of Okabe and Ito, and viridis, which colour-blind readers tell apart; series differ in their markers too.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

ORANGE, SKY, GREEN, BLUE, RED, GREY, BLACK = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#777777",
    "#000000",
)
SERIES = {
    "tuned": ("tuned", BLUE, "o", "-"),
    "elastic": ("tuned for several budgets at once", GREEN, "s", "-"),
    "free": ("free", ORANGE, "^", "--"),
    "random": ("random tokens, tuned", GREY, "x", ":"),
}
"""Label, colour, marker and line of each series."""
CLEARLY = 1.25
"""Attention is called more concentrated in one layer than in another from this ratio on."""


def _per_cent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.01 or value == 0 else f"{100 * value:.1g} %"


def _attention(numbers: Mapping[str, Any]) -> str:
    """What patches hold shares of: CLS attends to itself too, which is no part of it."""
    return "what CLS gives to the patches" if numbers["has_cls"] else "the attention that patches receive"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Axes, *, x: str = "", y: str = "") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _show_picture(axes: Axes, picture: Image.Image, title: str = "") -> None:
    axes.imshow(picture)
    axes.set_axis_off()
    axes.set_title(title, fontsize="small")


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def draw_attention_maps(
    numbers: Mapping[str, Any], drawn: Sequence[tuple[Image.Image, Image.Image]]
) -> Figure:
    """(picture, attention map) of each picture, side by side."""
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = _figure(4.6 * columns + 0.6, 2.5 * rows + 0.9)
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, ((picture, attention), found) in enumerate(zip(drawn, numbers["pictures"], strict=True)):
        row, column = divmod(place, columns)
        _show_picture(grid[row, 2 * column], picture, "as the tower sees it")
        title = f"half on {found['holding_half']}, on one {_per_cent(found['most'])}"
        _show_picture(grid[row, 2 * column + 1], attention, title)
    half = _range([found["holding_half"] for found in numbers["pictures"]])
    figure.suptitle(
        f"{half} of {numbers['num_patches']} patches hold half of {_attention(numbers)}\n"
        f"layer {numbers['layer']} of {numbers['num_layers']}; violet: none, yellow: the picture's most, scale of square roots",
        fontsize="medium",
    )
    return figure


def layers_seen(shares: Sequence[float]) -> str:
    """What the share of the most attended patches does from the first layer to the last, with the shares it speaks of."""
    peak = max(range(len(shares)), key=lambda index: shares[index])
    low = min(range(peak + 1), key=lambda index: shares[index])
    rises, falls = shares[peak] > CLEARLY * shares[low], shares[peak] > CLEARLY * shares[-1]
    most = f"most concentrated in layer {peak + 1} ({_per_cent(shares[peak])})"
    if not rises and not falls:
        return f"Attention is about as concentrated in all layers ({_per_cent(min(shares))} to {_per_cent(shares[peak])})"
    first = f"broad in layer {low + 1} ({_per_cent(shares[low])}), " if rises else ""
    last = f", and broader again in the last ({_per_cent(shares[-1])})" if falls else ""
    return f"Attention is {first}{most}{last}"


def draw_top_share(numbers: Mapping[str, Any]) -> Figure:
    """The share of the attention that the top k patches hold, by layer, a line for each k."""
    figure = _figure(8.8, 4.8)
    axes = figure.subplots()
    layers = range(1, numbers["num_layers"] + 1)
    styles = zip((BLUE, ORANGE, GREEN, RED), ("o", "s", "^", "D"), strict=True)
    for line, (colour, marker) in zip(numbers["lines"], styles, strict=False):
        values = [100 * share for share in line["shares"]]
        axes.plot(layers, values, color=colour, marker=marker, markersize=4)
        axes.axhline(100 * line["uniform"], color=colour, linewidth=0.8, linestyle=":")
        axes.annotate(
            f" top {line['top']}", (layers[-1], values[-1]), color=colour, va="center", annotation_clip=False
        )
    axes.axvline(numbers["layer"], color=BLACK, linewidth=0.8)
    axes.annotate(
        " the layer that VisionZip reads",
        (numbers["layer"], 1.0),
        xycoords=("data", "axes fraction"),
        fontsize="small",
    )
    axes.set_ylim(0, 100)
    axes.set_xlim(0.5, numbers["num_layers"] * 1.12)
    axes.set_xticks(
        [layer for layer in layers if numbers["num_layers"] <= 14 or layer % 2 == numbers["num_layers"] % 2]
    )
    _plain(
        axes,
        x="layer of the vision tower",
        y=f"top k of {numbers['num_patches']} patches, % of {_attention(numbers)}",
    )
    titled = numbers["lines"][numbers["titled"]]
    figure.suptitle(
        f"{layers_seen(titled['shares'])}\nin brackets: the share of the top {titled['top']}; dotted lines: if all patches had "
        f"the same; mean of {numbers['num_pictures']} pictures",
        fontsize="medium",
    )
    return figure


def draw_softmax_gradient(numbers: Mapping[str, Any]) -> Figure:
    """Above, the gradient against the attention weight; below, how many weights there are of each size."""
    figure = _figure(7, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    bins = numbers["bins"]
    weights = [part["mean_weight"] for part in bins]
    above.plot(weights, [part["mean_gradient"] for part in bins], color=BLUE, marker="o", markersize=4)
    above.plot(weights, weights, color=GREY, linewidth=0.8, linestyle=":")
    above.annotate(
        "dotted: as large as the weight p",
        (0.02, 0.93),
        xycoords="axes fraction",
        color=GREY,
        fontsize="small",
    )
    above.set_xscale("log")
    above.set_yscale("log")
    _plain(above, y="gradient dp/dz of the softmax")
    total = sum(part["weights"] for part in bins)
    for part in bins:
        share, width = 100 * part["weights"] / total, part["to"] - part["from"]
        below.bar(
            part["from"], share, width=width, align="edge", color=ORANGE, edgecolor="white", linewidth=0.5
        )
    _plain(below, x="attention weight p of a token (log scale)", y="% of the weights")
    top = numbers["top_tenth"]
    figure.suptitle(
        f"The {top['tokens']} most attended of {numbers['num_tokens']} tokens get {_per_cent(top['gradient'])} of the "
        f"softmax's gradient\nthey hold {_per_cent(top['attention'])} of the attention; layer {numbers['layer']}, "
        f"{numbers['num_rows']:,} rows, each head by itself",
        fontsize="medium",
    )
    return figure


def draw_kept_tokens(numbers: Mapping[str, Any], drawn: Sequence[Sequence[Image.Image]]) -> Figure:
    """One row a picture: the picture, then what is kept of it at each budget."""
    budgets = numbers["budgets"]
    figure = _figure(2.3 * (1 + len(budgets)) + 0.3, 2.35 * len(drawn) + 1.25)
    grid = figure.subplots(len(drawn), 1 + len(budgets), squeeze=False)
    for row, pictures in enumerate(drawn):
        for column, picture in enumerate(pictures):
            _show_picture(grid[row, column], picture)
    grid[0, 0].set_title("as the tower sees it", fontsize="small")
    for axes, budget in zip(grid[0, 1:], budgets, strict=True):
        parts = f"{budget['dominant']} dominant + {budget['contextual']} contextual"
        share = f"dominant: {_per_cent(budget['attention'])} of the patches' attention"
        axes.set_title(f"budget {budget['budget']}\n{parts}\n{share}", fontsize="small")
    least, most = budgets[0], budgets[-1]
    figure.suptitle(
        f"Dominant tokens hold {_per_cent(least['attention'])} of {_attention(numbers)} at a budget of {least['budget']}, "
        f"{_per_cent(most['attention'])} at {most['budget']}\n"
        f"of {numbers['num_patches']} patches; orange: dominant, blue: contextual, into which the dark ones are merged",
        fontsize="medium",
    )
    return figure


def _seen_in_recovery(full: float | None, points: Sequence[Mapping[str, Any]]) -> str:
    """Free and tuned at the smallest budget that has both."""
    by_series: dict[str, dict[float, list[float]]] = {"free": {}, "tuned": {}}
    for point in points:
        by_series.get(point["series"], {}).setdefault(point["num_visual_tokens"], []).append(point["score"])
    both = sorted(set(by_series["free"]) & set(by_series["tuned"]))
    if not both:
        return ""
    free, tuned = (statistics.mean(by_series[name][both[0]]) for name in ("free", "tuned"))
    share = (lambda score: f"{_per_cent(score / full)}") if full else _per_cent
    return f"{both[0]:g} tokens: free {share(free)}, tuned {share(tuned)}" + (" of full" if full else "")


def _draw_series(axes: Axes, points: Sequence[Mapping[str, Any]], name: str) -> None:
    """Means over seeds as a line, and every run as a pale marker."""
    by_tokens: dict[float, list[float]] = {}
    for point in points:
        if point["series"] == name:
            by_tokens.setdefault(point["num_visual_tokens"], []).append(100 * point["score"])
    if not by_tokens:
        return
    label, colour, marker, line = SERIES[name]
    tokens = sorted(by_tokens)
    means = [statistics.mean(by_tokens[count]) for count in tokens]
    axes.plot(tokens, means, color=colour, marker=marker, linestyle=line, label=label)
    every = [(count, score) for count in tokens for score in by_tokens[count]]
    axes.scatter(*zip(*every, strict=True), color=colour, marker=marker, alpha=0.4, s=16)


def draw_recovery(numbers: Mapping[str, Any]) -> Figure:
    """Score over visual tokens, one panel a kind of question: free, tuned and random, and the line of full."""
    kinds = numbers["kinds"]
    figure = _figure(1 + 3.9 * len(kinds), 4.6)
    grid = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    counts = sorted({point["num_visual_tokens"] for point in numbers["points"]})
    for axes, kind in zip(grid, kinds, strict=True):
        points = [point | {"score": point["metrics"][kind]} for point in numbers["points"]]
        full = next((point["score"] for point in points if point["series"] == "full"), None)
        if full is not None:
            axes.axhline(100 * full, color=BLACK, linewidth=1)
            axes.annotate(" full", (0, 100 * full), xycoords=("axes fraction", "data"), va="bottom")
        for name in SERIES:
            _draw_series(axes, points, name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(counts[0] / 1.5, counts[-1] * 1.5)
        axes.set_ylim(0, 105)
        _plain(axes, x="visual tokens of a question (log scale)")
        axes.set_title(": ".join(filter(None, (kind, _seen_in_recovery(full, points)))), fontsize="medium")
    grid[0].set_ylabel(f"correct of {numbers['num_questions']} held-out questions, %")
    grid[0].legend(loc="lower right", frameon=False, fontsize="small")
    return figure


def change_seen(before: float, after: float) -> str:
    """What a per cent does, as it is shown: rounded."""
    shown, then = f"{before:.0f}", f"{after:.0f}"
    return (
        f"stays at {shown} %"
        if shown == then
        else f"{'falls' if after < before else 'rises'} from {shown} to {then} %"
    )


def draw_without_dominant(numbers: Mapping[str, Any]) -> Figure:
    """Bars of free, and where it is known tuned, with both parts and without either; one panel a kind of question."""
    kinds, variants = numbers["kinds"], numbers["variants"]
    figure = _figure(1 + 4.1 * len(kinds), 4.4)
    grid = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(grid, kinds, strict=True):
        for offset, name in ((-0.2, "free"), (0.2, "tuned")):
            label, colour, *_ = SERIES[name]
            known = [(place, variant[name][kind]) for place, variant in enumerate(variants) if variant[name]]
            for place, score in known:
                axes.annotate(
                    f"{100 * score:.0f}",
                    (place + offset, 100 * score),
                    ha="center",
                    va="bottom",
                    fontsize="small",
                )
            places, scores = [place + offset for place, _ in known], [100 * score for _, score in known]
            hatch = None if name == "tuned" else "//"
            if known:
                axes.bar(
                    places, scores, width=0.38, color=colour, label=label, hatch=hatch, edgecolor="white"
                )
        labels = [
            f"{variant['name']}\n{variant['dominant']} + {variant['contextual']}" for variant in variants
        ]
        axes.set_xticks(range(len(variants)), labels, fontsize="small")
        axes.set_xlim(-0.5, len(variants) - 0.5)
        _plain(axes)
        both, without = (100 * variants[place]["free"][kind] for place in (0, 1))
        axes.set_title(
            f"{kind}: without dominant tokens free {change_seen(both, without)}", fontsize="medium"
        )
    grid[0].set_ylim(0, 105)
    grid[0].set_ylabel(f"correct of {numbers['num_questions']} held-out questions, %")
    grid[-1].legend(loc="upper right", frameon=False, fontsize="small")
    return figure
