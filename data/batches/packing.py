"""Which tokens of the rows have to be run, and which rows share a micro batch of packed tokens."""

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from data.examples.tokens import Example, Examples
from vzip.templates.encode import IGNORED


class FlatTokens(NamedTuple):
    """All rows' ids and labels, one row behind the other."""

    ids: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "FlatTokens":
        if isinstance(examples, Examples):
            return cls(*examples.flat())
        stops = np.cumsum([len(example.ids) for example in examples])
        ids, labels = (
            np.concatenate([getattr(example, name) for example in examples]) for name in ("ids", "labels")
        )
        return cls(ids, labels, np.concatenate([[0], stops[:-1]]), stops)

    def first(self, where: np.ndarray) -> np.ndarray:
        """int64[rows]: place in its row of each row's first token for which `where` holds; the row's length without one."""
        places = np.append(np.flatnonzero(where), len(where))
        found: np.ndarray = np.minimum(places[np.searchsorted(places, self.starts)], self.stops) - self.starts
        return found

    def last(self, where: np.ndarray) -> np.ndarray:
        """int64[rows]: place in its row of the last such token; negative if there is none."""
        places = np.append(-1, np.flatnonzero(where))
        found: np.ndarray = places[np.searchsorted(places, self.stops) - 1] - self.starts
        return found


def num_tail_tokens(examples: Sequence[Example], placeholders: Sequence[int]) -> np.ndarray:
    """int64[rows]: tokens at the end of each row whose output nothing needs: the last label, and what stands behind it.

    Tokens of images, by their ids `placeholders`, are always run.
    """
    rows = FlatTokens.of(examples)
    ends = np.maximum(rows.last(rows.labels != IGNORED), rows.last(np.isin(rows.ids, placeholders)) + 1)
    tails: np.ndarray = rows.stops - rows.starts - ends
    return tails


def shared_prefix(examples: Sequence[Example], placeholders: Sequence[int]) -> list[int]:
    """The ids that all rows with images begin with, up to the first image; none of them, nor the next one, is a label."""
    rows = FlatTokens.of(examples)
    images = rows.first(np.isin(rows.ids, placeholders))
    has_gradient = images < rows.stops - rows.starts
    if not has_gradient.any():
        return []
    limit = int(np.minimum(images, rows.first(rows.labels != IGNORED) - 1)[has_gradient].min())
    starts, prefix = rows.starts[has_gradient], []
    for place in range(limit):
        found = rows.ids[starts + place]
        if (found != found[0]).any():
            break
        prefix.append(int(found[0]))
    return prefix


class MicroBatchSpec(NamedTuple):
    """Rows of one micro batch."""

    rows: list[int]
    reducer: int = 0
    """By which their placeholders are counted, where there are several."""


def pack(
    rows: Sequence[int], lengths: np.ndarray, *, tokens: int, world_size: int, seed: Sequence[int]
) -> list[MicroBatchSpec]:
    """The rows in micro batches of at most `tokens` tokens and of like size, few of them, and as many on each rank.

    Longest first, each row goes where there are the fewest tokens. A row of more than `tokens` tokens is alone.

    Args:
        rows: row numbers.
        lengths: int64[reducers, all rows], tokens of each row under each reducer. With several, one is drawn for each micro
            batch.
        tokens: of a micro batch.
        world_size: ranks, which take turns.
        seed: of the draws.
    """
    longest_first = sorted(rows, key=lambda row: (-lengths[:, row].max(), row))
    least = int(lengths[:, rows].min(axis=0).clip(max=tokens).sum())
    for num_rounds in count(max(1, -(-least // (tokens * world_size)))):
        num_parts = num_rounds * world_size
        reducers = np.random.default_rng([number % 2**32 for number in seed]).integers(
            len(lengths), size=num_parts
        )
        parts, loads = (
            [MicroBatchSpec([], int(reducer)) for reducer in reducers],
            np.zeros(num_parts, dtype=np.int64),
        )
        for row in longest_first:
            after = loads + lengths[reducers, row]
            place = int(after.argmin())
            loads[place] = after[place]
            parts[place].rows.append(row)
        if all(load <= tokens or len(part.rows) == 1 for load, part in zip(loads, parts, strict=True)):
            return parts
    raise AssertionError
