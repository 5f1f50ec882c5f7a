"""Show a preflight's report to people: two tables and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich.console import Console
from rich.table import Table

from data.preflight.lengths import MEASURES, ExampleLengths
from vzip.files import atomic_write

MAX_PANELS = 8
"""The picture shows so many of the largest sources."""
MAX_LEFT_OUT = 10
"""So many of the examples that are left out are printed. `check.json` has all of them."""
MAX_TURNS = 6
"""The sentence about the cut names at most so many turns. `check.json` has all of them."""
BLUE = "#0072B2"
ORANGE = "#E69F00"
BLACK = "#000000"
"""Colours of Okabe and Ito's palette, which colour-blind readers can tell apart."""


def print_report(report: Mapping[str, Any]) -> None:
    """Print counts by source, cuts, lengths, and the first examples that are left out."""
    console = Console()

    # The sources come first, and all of them together in the last line.
    groups = {**report["sources"], "all": report["all"]}

    console.print(_counts_table(groups))
    if report["all"]["cut"]["rows"]:
        console.print(_cut_sentence(report), soft_wrap=True, highlight=False)
    console.print(_lengths_table(groups))

    # Names of examples may hold anything, so nothing in them is markup.
    for bad in report["left_out"][:MAX_LEFT_OUT]:
        line = f"  left out: {bad['id']} ({bad['source']}): {bad['reason']}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    num_others = len(report["left_out"]) - MAX_LEFT_OUT
    if num_others > 0:
        console.print(f"  and {num_others:,} more, which check.json lists", highlight=False)


def _counts_table(groups: Mapping[str, Any]) -> Table:
    """Make the table of each source's counts."""
    table = Table(title="examples of the subset", title_justify="left")
    table.add_column("source", no_wrap=True)
    for title in (
        "examples",
        "media",
        "left out",
        "no label",
        "cut",
        "labels lost",
        "too long",
        "broken files",
    ):
        table.add_column(title, justify="right")

    for source, group in groups.items():
        table.add_row(
            source,
            f"{group['rows']:,}",
            f"{group['media']:,}",
            f"{group['left_out']:,}",
            f"{group['without_labels']:,}",
            f"{group['cut']['rows']:,}",
            f"{group['cut']['lost_share']:.2%}",
            f"{group['too_long']:,}",
            f"{group['broken_files']:,}",
        )
    return table


def _cut_sentence(report: Mapping[str, Any]) -> str:
    """Say in which turns the cut falls, the most frequent ones first."""
    by_turn = report["all"]["cut"]["rows_by_turn"]
    most_first = sorted(by_turn.items(), key=lambda item: -item[1])

    # Long conversations have many turns, so the rare ones are counted together.
    turns = [f"{turn} ({count:,} examples)" for turn, count in most_first[:MAX_TURNS]]
    num_others = sum(count for _, count in most_first[MAX_TURNS:])
    if num_others:
        turns.append(f"others ({num_others:,} examples)")

    return f"the cut at data.max_tokens={report['max_tokens']} falls in turn {', '.join(turns)}"


def _lengths_table(groups: Mapping[str, Any]) -> Table:
    """Make the table of each measure's mean, percentiles and maximum, by source."""
    table = Table(title="tokens, after the cut and the reducer", title_justify="left")
    for title in ("per example", "source"):
        table.add_column(title, no_wrap=True)
    for title in ("mean", "p10", "p50", "p90", "max"):
        table.add_column(title, justify="right")

    for measure, title in MEASURES.items():
        for source, group in groups.items():
            values = [f"{value:,.0f}" for value in group["tokens"][measure].values()]
            table.add_row(title, source, *values)

        # A line between the measures.
        table.add_section()
    return table


def draw_report(lengths: ExampleLengths, report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG with the distribution of lengths and label tokens, by source.

    Without any example that has a label there is no distribution, and no picture.
    """
    sources = [source for source, group in report["sources"].items() if group["rows"]][:MAX_PANELS]
    if not sources:
        return

    # A panel has the same size in every picture, so the picture grows with the number of sources.
    figure = Figure(figsize=(10, 1.6 + 1.3 * len(sources)), layout="constrained")
    grid = figure.subplots(len(sources), 2, sharex="col", squeeze=False)
    max_positions = report["max_positions"]
    tokens = report["all"]["tokens"]

    # On the left are tokens in the language model, at least up to its limit, so that the distance
    # to it can be seen. On the right are label tokens.
    longest = max(tokens["expanded"]["max"], max_positions)
    most_labels = tokens["labels"]["max"]
    _draw_column(grid[:, 0], lengths, lengths.expanded, sources, last=longest, colour=BLUE)
    _draw_column(grid[:, 1], lengths, lengths.labels, sources, last=most_labels, colour=ORANGE)

    # Mark the language model's limit beside the lengths of each source.
    for axes, source in zip(grid[:, 0], sources, strict=True):
        axes.axvline(max_positions, color=BLACK, linestyle="--", linewidth=1)
        axes.set_ylabel(f"{source}\n{report['sources'][source]['rows']:,} examples\n% of examples")

    grid[-1, 0].set_xlabel(f"{MEASURES['expanded']}, per example (log scale)")
    grid[-1, 1].set_xlabel(f"{MEASURES['labels']}, per example (log scale)")
    grid[0, 0].set_title(
        f"Length in the language model (dashed: its limit of {max_positions:,})", fontsize="medium"
    )
    grid[0, 1].set_title("Tokens that carry the loss", fontsize="medium")

    # The title says in words what the left column shows.
    expanded = tokens["expanded"]
    figure.suptitle(
        f"Half of the {report['all']['rows']:,} examples are at most {expanded['p50']:,.0f} tokens long, "
        f"nine in ten at most {expanded['p90']:,.0f}, the longest {expanded['max']:,}.\n"
        f"By source, the largest first. A line marks the median."
    )
    with atomic_write(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")


def _draw_column(
    column: np.ndarray,
    lengths: ExampleLengths,
    values: np.ndarray,
    sources: list[str],
    *,
    last: int,
    colour: str,
) -> None:
    """Draw a histogram of `values` for each source, all with the same bins, which end at `last`."""
    first = max(1, values[lengths.trained].min())
    # Lengths are whole numbers. Among the small ones, several edges fall on one number.
    edges = np.geomspace(first, last + 1, 41).astype(int)
    bins = np.unique([*edges, last + 1]).tolist()

    for axes, source in zip(column, sources, strict=True):
        _draw_histogram(axes, values[lengths.trained & (lengths.sources == source)], bins, colour)
    _format_log_axis(column[-1].xaxis)


def _draw_histogram(axes: Axes, values: np.ndarray, bins: list[float], colour: str) -> None:
    """Draw the share of examples by length in percent, with the median marked."""
    # The bars of a source add up to 100, so small sources can be compared with large ones.
    weights = np.full(len(values), 100 / len(values))
    axes.hist(values, bins=bins, weights=weights, color=colour)
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)

    median = float(np.median(values))
    axes.axvline(median, color=BLACK, linewidth=1)
    axes.annotate(f" {median:,.0f}", (median, 0.97), xycoords=("data", "axes fraction"), va="top")


def _format_log_axis(axis: Axis) -> None:
    """Label 1, 2, 5, 10, ... with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
