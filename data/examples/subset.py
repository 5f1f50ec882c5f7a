"""Draw a seeded subset of a data set, stratified by source.

The subset is the same on every machine and in every order of the data.
"""

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
    """The examples of each source in the order in which they are drawn, and how many are wanted.

    Attributes:
        candidates: by source, positions in the table. Those behind the wanted ones replace examples
            that turn out to be unusable.
        wanted: by source, the number of examples.
        keys: by position, the key that examples are sorted by.
    """

    candidates: dict[str, list[int]]
    wanted: dict[str, int]
    keys: dict[int, str]

    @property
    def positions(self) -> list[int]:
        """Positions that were drawn, in the order of a run."""
        drawn: list[int] = []
        for source, candidates in self.candidates.items():
            drawn += candidates[: self.wanted[source]]
        return self.ordered(drawn)

    @property
    def num_wanted(self) -> int:
        """Number of examples wanted of all sources together."""
        return sum(self.wanted.values())

    def ordered(self, positions: Iterable[int]) -> list[int]:
        """Sort positions into the order of a run."""
        return sorted(positions, key=self.keys.__getitem__)


def draw_subset(
    table: Table,
    *,
    fraction: float,
    seed: int,
    sources: Sequence[str] | None = None,
    text_examples: bool = True,
) -> DrawnSubset:
    """Draw `fraction` of the usable examples of each source (rounded up), in a random order.

    The order depends on the seed and the content alone: examples are sorted by the sha256 of both.
    An example that is added to the data does not move the others.

    Args:
        table: all examples.
        fraction: in (0, 1].
        seed: seed of the order.
        sources: the sources to draw from. None for all of them.
        text_examples: whether to draw examples without an image or video.

    Raises:
        UserError: the fraction is outside (0, 1], the data has no such source, or nothing can be
            drawn.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction={fraction} must lie in (0, 1]; 0.1 is a tenth")

    # Sorted by these keys, the examples are in a random order.
    by_source: dict[str, list[int]] = defaultdict(list)
    keys = {}
    columns = [table.column(name) for name in ("source", "digest", "has_media", "fault")]
    for position, (source, digest, has_media, fault) in enumerate(zip(*columns, strict=True)):
        if fault is None and (has_media or text_examples):
            keys[position] = hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()
            by_source[source].append(position)

    # Without this check, a mistyped source would make the subset smaller without a word.
    unknown = sorted(set(sources or ()) - set(by_source))
    if unknown:
        raise UserError(
            f"data.sources={list(sources or ())}: the data has no {unknown}; it has {sorted(by_source)}"
        )

    # Take the decimal that the user wrote: in binary, 0.07 of 100 would be rounded up to 8.
    share = Fraction(str(fraction))
    candidates = {}
    wanted = {}
    for source in sorted(sources or by_source):
        candidates[source] = sorted(by_source[source], key=keys.__getitem__)
        wanted[source] = math.ceil(share * len(candidates[source]))

    if not keys:
        raise UserError(
            "no example can be drawn: the data has no usable one, or data.text_examples=false leaves none"
        )
    return DrawnSubset(candidates, wanted, keys)
