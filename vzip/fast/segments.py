"""Examples packed one after another into one sequence, and the prefix that all of them share.

Legend of shapes: T tokens of the sequence, R examples, P tokens of the prefix, which are not among
the T; K key heads, c width of a head; G examples of a block, L tokens of its longest example.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

Prefix = tuple[Tensor, Tensor]
"""Keys and values float[K, P, c] of one layer."""

SIMILAR = 0.8
"""Examples share a block if the shortest has at least this share of the longest one's tokens."""

MAX_BLOCK = 2048
"""Most padded tokens of a block of several examples: a bound of the attention scores."""


@dataclass(frozen=True)
class Block:
    """Neighbouring examples of similar length that are attended together, padded to the longest.

    Attributes:
        start: position of the block's first token in the sequence.
        stop: position after its last token.
        num_examples: G.
        length: L.
        to_padded: int64[G * L], the token of start:stop at each padded place. Padding repeats an
            example's last token.
        from_padded: int64[stop - start], the padded place of each token.
    """

    start: int
    stop: int
    num_examples: int
    length: int
    to_padded: Tensor
    from_padded: Tensor


class Segments:
    """Where the examples of a packed sequence begin and end, in the forms that attention needs.

    Args:
        lengths: tokens of each example, without the prefix.
        prefixes: keys and values of the prefix, by layer.
    """

    def __init__(self, lengths: Sequence[int], prefixes: Sequence[Prefix]) -> None:
        assert lengths and min(lengths) > 0
        self.lengths = tuple(lengths)
        self.prefixes = prefixes
        self.starts = tuple(accumulate(lengths, initial=0))

        first_keys, _ = prefixes[0]
        self.num_prefix = first_keys.shape[1]
        self.device = first_keys.device

    @cached_property
    def first(self) -> Tensor:
        """int64[T]: the index of the first token of each token's example."""
        starts = torch.tensor(self.starts[:-1])
        return starts.repeat_interleave(torch.tensor(self.lengths)).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64[1, T]: the position of each token in its own example, the prefix counted.

        int64[3, 1, T] for a model that numbers visual tokens by time, row and column.
        """
        # Positions start again in each example, as if it were alone behind the prefix.
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        return (positions + self.num_prefix)[None].to(self.device)

    def set_positions(self, positions: Tensor | None) -> None:
        """Use positions int64[3, T], counted from the end of the prefix; None to count tokens."""
        if positions is not None:
            self.positions = (positions + self.num_prefix)[:, None]

    @cached_property
    def query_bounds(self) -> Tensor:
        """int32[R + 1]: where the queries of each example begin; the last entry is T."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.device)

    @cached_property
    def key_bounds(self) -> Tensor:
        """int32[R + 1]: where the keys of each example begin, its own copy of the prefix first."""
        starts = [start + index * self.num_prefix for index, start in enumerate(self.starts)]
        return torch.tensor(starts, dtype=torch.int32, device=self.device)

    @cached_property
    def key_order(self) -> Tensor:
        """int64[T + R * P]: the prefix before each example, as positions in (prefix, sequence)."""
        prefix = torch.arange(self.num_prefix)
        tokens = torch.arange(self.starts[-1]) + self.num_prefix

        order = []
        for example in torch.split(tokens, list(self.lengths)):
            order += [prefix, example]
        return torch.cat(order).to(self.device)

    @cached_property
    def blocks(self) -> list[Block]:
        """The examples in blocks of neighbours of similar length."""
        return [self._block(first, last) for first, last in self._block_bounds()]

    def _block_bounds(self) -> Iterator[tuple[int, int]]:
        """Yield each block's first example, and the one after its last."""
        # Only neighbours share a block, so examples that were sorted by length need least padding.
        first = 0
        for index in range(1, len(self.lengths)):
            lengths = self.lengths[first : index + 1]
            is_similar = min(lengths) >= SIMILAR * max(lengths)
            if not is_similar or len(lengths) * max(lengths) > MAX_BLOCK:
                yield first, index
                first = index

        yield first, len(self.lengths)

    def _block(self, first: int, last: int) -> Block:
        start = self.starts[first]
        starts = torch.tensor(self.starts[first:last]) - start
        lengths = torch.tensor(self.lengths[first:last])

        # Padding repeats an example's last token, so that all indices exist; nothing reads it.
        offset = torch.arange(int(lengths.max()))
        to_padded = starts[:, None] + torch.minimum(offset, lengths[:, None] - 1)
        from_padded = (offset < lengths[:, None]).flatten().nonzero().flatten()

        return Block(
            start=start,
            stop=self.starts[last],
            num_examples=last - first,
            length=len(offset),
            to_padded=to_padded.flatten().to(self.device),
            from_padded=from_padded.to(self.device),
        )
