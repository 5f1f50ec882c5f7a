"""Draw a seeded part of a data set, stratified by source, the same on every machine and in every order of the rows."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from data.conversations import BadRow, Row
from vzip import UserError


def draw(rows: Sequence[Row], *, fraction: float, seed: int) -> list[Row]:
    """`fraction` of the rows of each source (rounded up), in an order that depends on seed and content alone.

    Each row's place is the sha256 of seed and content, so adding a row elsewhere moves no other row.
    Raises UserError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction={fraction} must lie in (0, 1]; 0.1 is a tenth")

    def place(row: Row) -> str:
        return hashlib.sha256(f"{seed}:{row.digest}".encode()).hexdigest()

    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_source[row.source].append(row)
    drawn = []
    for source in sorted(by_source):
        ordered = sorted(by_source[source], key=place)
        drawn += ordered[: math.ceil(Fraction(str(fraction)) * len(ordered))]  # 0.07 of 100 is 7, not 8
    return sorted(drawn, key=place)


def manifest(rows: Sequence[Row], bad: Sequence[BadRow], *, fraction: float, seed: int) -> dict[str, Any]:
    """What a run records of its data: counts by source, the ids, what was left out, and a hash of the content."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: row.digest):
        digest.update(row.digest.encode())
    return {
        "fraction": fraction,
        "seed": seed,
        "num_rows": len(rows),
        "num_rows_by_source": dict(sorted(Counter(row.source for row in rows).items())),
        "hash": digest.hexdigest(),
        "bad_rows": [vars(row) for row in bad],
        "ids": [row.id for row in rows],
    }
