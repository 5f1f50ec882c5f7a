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
        items: the items to iterate over. None if the caller moves the bar with its `update`.
        total: number of items, including `start`.
        title: text in front of the bar.
        unit: unit of the items. "B" (bytes) is scaled to kB, MB, ...
        start: number of items that were done before.
        shown: whether there is a bar at all.
    """
    # A terminal redraws one line. In a log file every update is a new line, so they are rare.
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
