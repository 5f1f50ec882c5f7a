"""The table of an efficiency report."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

MEBIBYTE = 2**20
# Each time and size is a line of the table, in this order.
SIZES = {
    "num_visual_tokens": ("visual tokens", 1),
    "kv_bytes": ("KV cache after prefill, MiB", MEBIBYTE),
    "weight_bytes": ("weights, MiB", MEBIBYTE),
    "peak_bytes": ("peak memory above the weights, MiB", MEBIBYTE),
    "total_bytes": ("weights and peak memory, MiB", MEBIBYTE),
}
"""Label of each size, and the number that it is divided by."""
TIMES = {
    "language": ("prefill, language model alone, ms", 1000),
    "whole": ("time to first token, from the pixels, ms", 1000),
    "token": ("each token after it, ms", 1000),
    "questions": ("all questions, s", 1),
}
"""Label of each time, and the number that its seconds are multiplied by."""
FORMULAS = {
    "by FLOPs": {"language": "language_flops", "whole": "whole_flops"},
    "paper": {"language": "paper_flops"},
}
"""Columns of computed ratios. Each names the figure that belongs to a time."""


def _size_line(
    size: str,
    reduced: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Make one line of the table: a size in each setting, and its ratio to the reduced one."""
    label, unit = SIZES[size]

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value / unit:,.4g}"

    line = [label, shown(reduced[size])]
    for other in others:
        # There may be no ratio: some systems do not report the peak, and a small model may need 0.
        has_ratio = other[size] is not None and reduced[size] > 0
        ratio = f"{other[size] / reduced[size]:.2f}" if has_ratio else ""
        line += [shown(other[size]), ratio]

        # The formulas compute times alone.
        line += [""] * len(FORMULAS)

    return line


def _time_line(
    time: str,
    reduced: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Make one line of the table: a time in each setting, and its ratios to the reduced one."""
    label, unit = TIMES[time]
    line = [label, f"{unit * reduced[time]['median_s']:,.4g}"]
    for other in others:
        # The settings of a round ran right after each other, so the range of the ratios over the
        # rounds shows how far the ratio of the medians can be trusted.
        rounds = zip(other[time]["seconds"], reduced[time]["seconds"], strict=True)
        ratios = [seconds / reduced_seconds for seconds, reduced_seconds in rounds]
        ratio = other[time]["median_s"] / reduced[time]["median_s"]

        line.append(f"{unit * other[time]['median_s']:,.4g}")
        line.append(f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")

        # A formula does not cover every time. Its cell is empty then.
        for figures in FORMULAS.values():
            flops = figures.get(time)
            line.append(f"{other[flops] / reduced[flops]:.2f}" if flops else "")

    return line


def print_efficiency(figures: Mapping[str, Any]) -> None:
    """Print the table: a column for each setting, and its figures relative to the reduced one."""
    reduced_name = figures["reduced"]
    reduced = figures["rows"][reduced_name]
    others = {name: row for name, row in figures["rows"].items() if name != reduced_name}

    # The reduced setting has the first column of figures. The others are compared with it.
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
    for time in TIMES:
        table.add_row(*_time_line(time, reduced, list(others.values())))

    # A log file has no width, and the default of 80 columns would break the lines.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
