"""Draw the figures about attention and kept tokens, from numbers and pictures.

The colours are those of Okabe and Ito, and viridis, which colour-blind readers can tell apart.
Lines also differ in their markers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

ORANGE = "#E69F00"
GREEN = "#009E73"
BLUE = "#0072B2"
RED = "#D55E00"
GREY = "#777777"
BLACK = "#000000"


def per_cent(share: float) -> str:
    """Format a share in per cent: as a whole number, or with one significant digit below 1 %."""
    digits = ".0f" if share >= 0.01 or share == 0 else ".1g"
    return f"{100 * share:{digits}} %"


def new_figure(width: float, height: float, title: str) -> Figure:
    """Make an empty figure of so many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure


def label_axes(axes: Axes, *, x: str = "", y: str = "") -> None:
    """Label the axes, and leave out the frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _show_picture(axes: Axes, picture: Image.Image, title: str = "") -> None:
    axes.imshow(picture)
    axes.set_axis_off()
    axes.set_title(title, fontsize="small")


def _attention(numbers: Mapping[str, Any]) -> str:
    """Name what the shares are shares of. The attention of CLS to itself is not counted."""
    return "attention from CLS to the patches" if numbers["has_cls"] else "attention that patches receive"


def draw_attention_maps(
    numbers: Mapping[str, Any], drawn: Sequence[tuple[Image.Image, Image.Image]]
) -> Figure:
    """Draw (picture, attention map) of each picture side by side, two pictures in a row."""
    # Round up: the last row may be half empty.
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = new_figure(
        4.6 * columns + 0.6,
        2.5 * rows + 0.9,
        f"The {_attention(numbers)}, layer {numbers['layer']} of {numbers['num_layers']}\n"
        f"violet: none, yellow: the most in this picture",
    )
    grid = figure.subplots(rows, 2 * columns, squeeze=False)

    # An empty place of the last row must not show axes.
    for axes in grid.flat:
        axes.set_axis_off()

    for index, (picture, attention) in enumerate(drawn):
        row, column = divmod(index, columns)
        holding_half = numbers["pictures"][index]["holding_half"]
        _show_picture(grid[row, 2 * column], picture, "input")
        _show_picture(
            grid[row, 2 * column + 1],
            attention,
            f"half on {holding_half} of {numbers['num_patches']} patches",
        )
    return figure


def draw_top_share(numbers: Mapping[str, Any]) -> Figure:
    """Draw the share of the attention on the top k patches, by layer, with a line for each k."""
    figure = new_figure(
        8.8,
        4.8,
        f"Attention on the most attended of {numbers['num_patches']} patches, by layer\n"
        f"mean of {numbers['num_pictures']} pictures; dotted: all patches have the same",
    )
    axes = figure.subplots()
    num_layers = numbers["num_layers"]
    layers = list(range(1, num_layers + 1))

    # A line for each k, and a dotted one for equal attention on all patches.
    styles = zip((BLUE, ORANGE, GREEN, RED), ("o", "s", "^", "D"), strict=True)
    for line, (colour, marker) in zip(numbers["lines"], styles, strict=False):
        values = [100 * share for share in line["shares"]]
        axes.plot(layers, values, color=colour, marker=marker, markersize=4)
        axes.axhline(100 * line["uniform"], color=colour, linewidth=0.8, linestyle=":")

        # The name stands at the line's end, where it is read faster than in a legend.
        axes.annotate(
            f" top {line['top']}",
            (layers[-1], values[-1]),
            color=colour,
            va="center",
            annotation_clip=False,
        )

    # Mark the layer that VisionZip reads: the concentration there is what the method lives on.
    axes.axvline(numbers["layer"], color=BLACK, linewidth=0.8)
    axes.annotate(
        "VisionZip's layer ",
        (numbers["layer"], 1.0),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="top",
        fontsize="small",
    )

    # Leave room for the names of the lines on the right.
    axes.set_ylim(0, 100)
    axes.set_xlim(0.5, num_layers * 1.12)

    # Numbers of many layers would overlap: write every other one, and always the last.
    if num_layers > 14:
        layers = [layer for layer in layers if layer % 2 == num_layers % 2]
    axes.set_xticks(layers)
    label_axes(axes, x="layer of the vision tower", y=f"% of the {_attention(numbers)}")
    return figure


def draw_softmax_gradient(numbers: Mapping[str, Any]) -> Figure:
    """Draw the gradient against the attention weight, and below how many weights have each size."""
    top = numbers["top_tenth"]
    figure = new_figure(
        7,
        5.6,
        f"Gradient of the softmax, layer {numbers['layer']}\n"
        f"the {top['tokens']} most attended of {numbers['num_tokens']} tokens hold "
        f"{per_cent(top['attention'])} of the attention and get {per_cent(top['gradient'])} of the gradient",
    )
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))

    # Above: the gradient p (1 - p). It follows the dotted line p, and leaves it for large weights.
    bins = numbers["bins"]
    weights = [each["mean_weight"] for each in bins]
    above.plot(weights, [each["mean_gradient"] for each in bins], color=BLUE, marker="o", markersize=4)
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
    label_axes(above, y="gradient dp/dz of the softmax")

    # Below: how many weights have each size. Most are tiny, which the curve above does not show.
    total = sum(each["weights"] for each in bins)
    for each in bins:
        below.bar(
            each["from"],
            100 * each["weights"] / total,
            width=each["to"] - each["from"],
            align="edge",
            color=ORANGE,
            edgecolor="white",
            linewidth=0.5,
        )
    label_axes(below, x="attention weight p of a token (log scale)", y="% of the weights")
    return figure


def draw_kept_tokens(numbers: Mapping[str, Any], drawn: Sequence[Sequence[Image.Image]]) -> Figure:
    """Draw a row per picture: the input, then the kept tokens at each budget."""
    budgets = numbers["budgets"]
    figure = new_figure(
        2.3 * (1 + len(budgets)) + 0.3,
        2.35 * len(drawn) + 1.25,
        f"Tokens that VisionZip keeps of {numbers['num_patches']} patches\n"
        f"orange: dominant; blue: contextual, into which the dark patches are merged",
    )
    grid = figure.subplots(len(drawn), 1 + len(budgets), squeeze=False)
    for row, pictures in enumerate(drawn):
        for column, picture in enumerate(pictures):
            _show_picture(grid[row, column], picture)

    # Only the first row has titles: the columns below show the same budgets.
    grid[0, 0].set_title("input", fontsize="small")
    for axes, budget in zip(grid[0, 1:], budgets, strict=True):
        axes.set_title(
            f"budget {budget['budget']}\n{budget['dominant']} + {budget['contextual']} tokens\n"
            f"{per_cent(budget['attention'])} of attention",
            fontsize="small",
        )
    return figure
