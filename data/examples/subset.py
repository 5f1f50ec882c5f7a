"""Draw a seeded part of a data set, stratified by source, the same on every machine and in every order of the rows."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from data.examples.table import Table
from vzip import UserError


@dataclass(frozen=True)
class DrawnSubset:
    """The rows of each source in the order in which they are drawn, and how many are wanted of each."""

    candidates: dict[str, list[int]]
    """Positions in the table, by source. Those behind the wanted ones take the place of rows that turn out unusable."""
    wanted: dict[str, int]
    keys: dict[int, str]
    """By position, what the order of all rows goes by."""

    @property
    def positions(self) -> list[int]:
        """The rows drawn, in order."""
        return self.ordered(
            row for source, rows in self.candidates.items() for row in rows[: self.wanted[source]]
        )

    @property
    def num_wanted(self) -> int:
        """Rows of all sources."""
        return sum(self.wanted.values())

    def ordered(self, positions: Iterable[int]) -> list[int]:
        """The positions in the order of a run."""
        return sorted(positions, key=self.keys.__getitem__)


def draw_subset(
    table: Table,
    *,
    fraction: float,
    seed: int,
    sources: Sequence[str] | None = None,
    text_examples: bool = True,
) -> DrawnSubset:
    """`fraction` of the usable rows of each source (rounded up), in an order that depends on seed and content alone.

    Each row is sorted by the sha256 of seed and content, so adding a row elsewhere moves no other row.

    Args:
        table: of all rows.
        fraction: in (0, 1].
        seed: of the order.
        sources: that are drawn from; None: all.
        text_rows: whether rows without an image or video are drawn.

    Raises:
        UserError: a fraction outside (0, 1], or a source that the data has not.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction={fraction} must lie in (0, 1]; 0.1 is a tenth")
    names = ("source", "digest", "has_media", "fault")
    by_source: dict[str, list[int]] = defaultdict(list)
    keys = {}
    for position, (source, digest, has_media, fault) in enumerate(
        zip(*map(table.column, names), strict=True)
    ):
        if fault is None and (has_media or text_examples):
            keys[position] = hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()
            by_source[source].append(position)
    if unknown := set(sources or ()) - set(by_source):
        raise UserError(
            f"data.sources={list(sources or ())}: the data has no {sorted(unknown)}; it has {sorted(by_source)}"
        )
    candidates = {
        source: sorted(by_source[source], key=keys.__getitem__) for source in sorted(sources or by_source)
    }
    if not any(candidates.values()):
        raise UserError(
            "no row can be drawn: the data has none that can be used, or data.text_rows=false leaves none"
        )
    share = Fraction(str(fraction))  # 0.07 of 100 is 7, not 8
    return DrawnSubset(
        candidates, {source: math.ceil(share * len(rows)) for source, rows in candidates.items()}, keys
    )
