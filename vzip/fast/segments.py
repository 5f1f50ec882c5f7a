"""Rows that lie one behind the other in one sequence, without padding, and the prefix that all of them share.

Legend of shapes: T tokens of the sequence, R rows, P tokens of the prefix, which is not among the T; K key heads, c width of a
head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

Prefix = tuple[Tensor, Tensor]
"""Keys and values float[K, P, c] of one layer."""
LIKE = 0.8
"""Rows share a block of attention if the shortest is at least this share of the longest."""
MAX_BLOCK = 2048
"""Tokens of a block of several rows, which bounds the attention scores that are held at once."""


@dataclass(frozen=True)
class Block:
    """Rows of like length that are attended together, each padded to the longest.

    Attributes:
        start: place of its first token in the sequence.
        stop: place behind its last token.
        num_rows: G.
        length: L, tokens of the longest.
        padded: int64[G * L], places in start:stop; those beyond a row's end are its last.
        kept: int64[stop - start], places in `padded` of the tokens.
    """

    start: int
    stop: int
    num_rows: int
    length: int
    padded: Tensor
    kept: Tensor


class Segments:
    """Where the rows of a packed sequence begin and end, as attention needs it.

    Args:
        lengths: tokens of each row, without the prefix.
        prefixes: keys and values of the prefix, by layer.
    """

    def __init__(self, lengths: Sequence[int], prefixes: Sequence[Prefix]) -> None:
        assert lengths and min(lengths) > 0
        self.lengths, self.prefixes = tuple(lengths), prefixes
        self.num_prefix, self.device = prefixes[0][0].shape[1], prefixes[0][0].device
        self.starts = tuple(accumulate(lengths, initial=0))

    @cached_property
    def positions(self) -> Tensor:
        """int64[1, T]: the place of each token in its own row, the prefix counted."""
        rows = [torch.arange(length) for length in self.lengths]
        return (torch.cat(rows) + self.num_prefix)[None].to(self.device)

    @cached_property
    def query_bounds(self) -> Tensor:
        """int32[R + 1]: where the rows' queries begin; the last entry is T."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.device)

    @cached_property
    def key_bounds(self) -> Tensor:
        """int32[R + 1]: where the rows' keys begin, when each row has its own copy of the prefix."""
        starts = [start + row * self.num_prefix for row, start in enumerate(self.starts)]
        return torch.tensor(starts, dtype=torch.int32, device=self.device)

    @cached_property
    def key_order(self) -> Tensor:
        """int64[T + R * P]: the prefix before each row, as places in the prefix with the sequence behind it."""
        prefix, tokens = torch.arange(self.num_prefix), torch.arange(self.starts[-1]) + self.num_prefix
        rows = [part for row in torch.split(tokens, list(self.lengths)) for part in (prefix, row)]
        return torch.cat(rows).to(self.device)

    @cached_property
    def blocks(self) -> list[Block]:
        """The rows in blocks of neighbours of like length; padding is little where the rows are sorted by length."""
        return [self._block(first, last) for first, last in self._neighbours()]

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        """(first, behind the last) row of each block."""
        first = 0
        for row in range(1, len(self.lengths)):
            group = self.lengths[first : row + 1]
            if min(group) < LIKE * max(group) or len(group) * max(group) > MAX_BLOCK:
                yield first, row
                first = row
        yield first, len(self.lengths)

    def _block(self, first: int, last: int) -> Block:
        lengths, start = torch.tensor(self.lengths[first:last]), self.starts[first]
        starts = torch.tensor(self.starts[first:last]) - start
        place = torch.arange(int(lengths.max()))
        padded = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)
        kept = (place < lengths[:, None]).flatten().nonzero().flatten()
        return Block(
            start=start,
            stop=self.starts[last],
            num_rows=last - first,
            length=len(place),
            padded=padded.flatten().to(self.device),
            kept=kept.to(self.device),
        )
