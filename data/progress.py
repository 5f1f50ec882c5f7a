"""Progress bars: live on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_EVERY_S = 10.0


def progress(
    items: Iterable[T] | None, *, total: int, title: str, unit: str = "it", start: int = 0, shown: bool = True
) -> "tqdm[T]":
    """`items` with a bar of done / total, rate and ETA on stderr; `start` items were done before.

    Without items the bar is moved by its `update`; in bytes where the unit is "B".
    """
    live = sys.stderr.isatty()
    return tqdm(
        items,
        total=total,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        initial=start,
        disable=not shown,
        mininterval=0.2 if live else LOG_EVERY_S,
        maxinterval=LOG_EVERY_S,
        delay=1.0,  # what is done at once needs no bar
        dynamic_ncols=live,
        ascii=not live,
    )
