"""Progress bars: live on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_EVERY_S = 10.0
"""Seconds between two lines in a log file."""


def progress(
    items: Iterable[T] | None,
    *,
    total: int,
    title: str,
    unit: str = "it",
    start: int = 0,
    shown: bool = True,
) -> "tqdm[T]":
    """Iterate over `items` with a bar of done / total, rate and remaining time on stderr.

    Args:
        items: what to iterate over. None: the caller moves the bar by its `update`.
        total: number of items, `start` included.
        title: stands in front of the bar.
        unit: of the items; "B" (bytes) is scaled to kB, MB, ...
        start: items that were done before.
        shown: False iterates without a bar.
    """
    is_terminal = sys.stderr.isatty()
    return tqdm(
        items,
        total=total,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        initial=start,
        disable=not shown,
        mininterval=0.2 if is_terminal else LOG_EVERY_S,
        maxinterval=LOG_EVERY_S,
        delay=1.0,  # work that is done at once needs no bar
        dynamic_ncols=is_terminal,
        ascii=not is_terminal,
    )
