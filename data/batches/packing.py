"""Which tokens of an example have to be run, and which examples share a packed micro batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.examples.tokens import Examples, FlatTokens
from vzip.templates.encode import IGNORED


def num_tail_tokens(tokens: FlatTokens, placeholders: Sequence[int]) -> np.ndarray:
    """int64[examples]: tokens at the end of each example whose output no loss needs.

    These are the last label, which nothing is predicted from, and everything behind it. Tokens of
    images and videos are always run, so the tail begins behind the last of them.

    Args:
        tokens: the examples.
        placeholders: ids of the tokens that stand for images and videos.
    """
    # The later one decides. Without a label, or without any image, there is a number below zero.
    last_label = tokens.last(tokens.labels != IGNORED)
    behind_last_medium = tokens.last(np.isin(tokens.ids, placeholders)) + 1
    tails: np.ndarray = tokens.lengths - np.maximum(last_label, behind_last_medium)
    return tails


def shared_prefix(examples: Examples, placeholders: Sequence[int]) -> list[int]:
    """The ids that all examples with images or videos begin with, up to the first placeholder.

    Neither a token of the prefix nor the one behind it is a label, so no loss needs the output of
    the prefix.

    Args:
        examples: the examples of a run.
        placeholders: ids of the tokens that stand for images and videos.
    """
    tokens = examples.flat_tokens()
    first_medium = tokens.first(np.isin(tokens.ids, placeholders))
    first_label = tokens.first(tokens.labels != IGNORED)

    # Text alone has no say: with a projector that learns, it is not run.
    has_media = first_medium < tokens.lengths
    if not has_media.any():
        return []

    # The output of the prefix's last token must not be needed: no label may follow it.
    limit = int(np.minimum(first_medium, first_label - 1)[has_media].min())
    starts = tokens.starts[has_media]
    prefix: list[int] = []
    for position in range(limit):
        ids = tokens.ids[starts + position]
        if (ids != ids[0]).any():
            break
        prefix.append(int(ids[0]))

    return prefix


class MicroBatchSpec(NamedTuple):
    """Which examples make up a micro batch."""

    examples: list[int]
    """Numbers of the examples."""
    reducer: int = 0
    """Number of the reducer that their images and videos go through, where a run has several."""


def pack(
    examples: Sequence[int],
    lengths: np.ndarray,
    *,
    tokens: int,
    world_size: int,
    seed: Sequence[int],
) -> list[MicroBatchSpec]:
    """Share examples out among micro batches, as few as possible and of similar size.

    Every rank gets the same number of them. The longest example comes first, and each one goes into
    the micro batch that then has the fewest tokens. An example of more than `tokens` tokens has a
    micro batch of its own.

    Args:
        examples: numbers of the examples to pack.
        lengths: int64[reducers, all examples], tokens of each example with each reducer. If there
            are several reducers, one is drawn for each micro batch.
        tokens: tokens that a micro batch may have.
        world_size: number of ranks, which take micro batches in turn.
        seed: integers that the reducers are drawn from.
    """
    longest_first = sorted(examples, key=lambda example: (-lengths[:, example].max(), example))

    # No packing needs fewer rounds than the tokens fill, whichever reducers are drawn.
    fewest_tokens = int(lengths[:, examples].min(axis=0).clip(max=tokens).sum())
    num_rounds = max(1, -(-fewest_tokens // (tokens * world_size)))

    while True:
        # numpy takes no negative seeds, but a user may set one.
        generator = np.random.default_rng([number % 2**32 for number in seed])
        reducers = generator.integers(len(lengths), size=num_rounds * world_size)
        specs, num_tokens = _fill(longest_first, lengths, reducers)

        is_alone = [len(spec.examples) == 1 for spec in specs]
        if np.all((num_tokens <= tokens) | is_alone):
            return specs

        # Examples can't be cut, so each rank may need one more than the tokens would fill.
        num_rounds += 1


def _fill(
    examples: Sequence[int], lengths: np.ndarray, reducers: np.ndarray
) -> tuple[list[MicroBatchSpec], np.ndarray]:
    """Fill one micro batch per entry of `reducers` evenly, in the order of the examples.

    Returns:
        The micro batches, and the tokens of each, int64[micro batches].
    """
    specs = [MicroBatchSpec([], int(reducer)) for reducer in reducers]
    num_tokens = np.zeros(len(specs), dtype=np.int64)

    for example in examples:
        # A micro batch's reducer decides how many tokens the example would add to it.
        after = num_tokens + lengths[reducers, example]
        emptiest = int(after.argmin())
        num_tokens[emptiest] = after[emptiest]
        specs[emptiest].examples.append(example)

    return specs, num_tokens
