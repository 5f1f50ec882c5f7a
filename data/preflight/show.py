"""The preflight's report for readers: a table and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich.console import Console
from rich.table import Table

from data.preflight.check import MEASURES, ExampleLengths

MAX_PANELS = 8
"""Sources that the picture shows, the largest ones."""
MAX_TURNS = 6
"""Turns that are named where most rows are cut; check.json has them all."""
BLUE, ORANGE, BLACK = "#0072B2", "#E69F00", "#000000"
"""Of Okabe and Ito's palette, which colour-blind readers tell apart."""


def _rows_table(parts: Mapping[str, Any]) -> Table:
    table = Table(title="rows of the subset", title_justify="left")
    table.add_column("source", no_wrap=True)
    for column in ("rows", "media", "left out", "no label", "cut", "labels lost", "too long", "broken files"):
        table.add_column(column, justify="right")
    for source, part in parts.items():
        before = (part["rows"], part["media"], part["left_out"], part["without_labels"], part["cut"]["rows"])
        after = (part["too_long"], part["broken_files"])
        lost = f"{part['cut']['lost_share']:.2%}"
        table.add_row(source, *(f"{count:,}" for count in before), lost, *(f"{count:,}" for count in after))
    return table


def _lengths_table(parts: Mapping[str, Any]) -> Table:
    table = Table(title="tokens, after the cut and the reducer", title_justify="left")
    for column in ("of a row", "source"):
        table.add_column(column, no_wrap=True)
    for column in ("mean", "p10", "p50", "p90", "max"):
        table.add_column(column, justify="right")
    for measured, title in MEASURES.items():
        for source, part in parts.items():
            table.add_row(title, source, *(f"{value:,.0f}" for value in part["tokens"][measured].values()))
        table.add_section()
    return table


def print_report(found: Mapping[str, Any]) -> None:
    """Two tables: what was found by source, and how long the rows are; between them, where rows were cut."""
    parts, console = {**found["sources"], "all": found["all"]}, Console()
    console.print(_rows_table(parts))
    if by_turn := found["all"]["cut"]["rows_by_turn"]:
        most = sorted(by_turn.items(), key=lambda item: -item[1])
        turns = [f"{turn} ({count:,} rows)" for turn, count in most[:MAX_TURNS]]
        if rest := sum(count for _, count in most[MAX_TURNS:]):
            turns.append(f"others ({rest:,} rows)")
        where = f"the cut at data.max_tokens={found['max_tokens']} falls in turn {', '.join(turns)}"
        console.print(where, soft_wrap=True, highlight=False)
    console.print(_lengths_table(parts))


def _bars(axes: Axes, values: np.ndarray, bins: list[float], colour: str) -> None:
    """The share of rows by length, with the median marked."""
    median = float(np.median(values))
    axes.hist(values, bins=bins, weights=np.full(len(values), 100 / len(values)), color=colour)
    axes.axvline(median, color=BLACK, linewidth=1)
    axes.annotate(f" {median:,.0f}", (median, 0.97), xycoords=("data", "axes fraction"), va="top")
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)


def draw_report(lengths: ExampleLengths, found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the spread of the rows' lengths and label tokens, for each of the `MAX_PANELS` largest sources.

    A subset of which no row has a label has no spread, and no picture.
    """
    sources = [source for source, part in found["sources"].items() if part["rows"]][:MAX_PANELS]
    if not sources:
        return
    limit, whole = found["max_positions"], found["all"]["tokens"]["expanded"]
    figure = Figure(figsize=(10, 1.6 + 1.3 * len(sources)), layout="constrained")
    grid = figure.subplots(len(sources), 2, sharex="col", squeeze=False)
    columns = (("expanded", lengths.expanded, BLUE), ("labels", lengths.labels, ORANGE))
    for column, (name, values, colour) in enumerate(columns):
        last = max(found["all"]["tokens"][name]["max"], limit if name == "expanded" else 0)
        edges = np.geomspace(max(1, values[lengths.trained].min()), last + 1, 41)
        bins = np.unique([*edges.astype(int), last + 1]).tolist()
        for row, source in enumerate(sources):
            _bars(grid[row, column], values[lengths.trained & (lengths.sources == source)], bins, colour)
            if name == "expanded":
                grid[row, 0].axvline(limit, color=BLACK, linestyle="--", linewidth=1)
                grid[row, 0].set_ylabel(f"{source}\n{found['sources'][source]['rows']:,} rows\n% of rows")
        grid[-1, column].set_xlabel(f"{MEASURES[name]}, of a row (log scale)")
        axis = grid[-1, column].xaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    grid[0, 0].set_title(
        f"Length in the language model; dashed: the {limit:,} that it takes", fontsize="medium"
    )
    grid[0, 1].set_title("Tokens that carry the loss", fontsize="medium")
    figure.suptitle(
        f"Half of the {found['all']['rows']:,} rows are at most {whole['p50']:,.0f} tokens long, nine in ten at most "
        f"{whole['p90']:,.0f}, the longest {whole['max']:,}\nby source, the largest first; a line marks the median"
    )
    figure.savefig(path, dpi=120)
