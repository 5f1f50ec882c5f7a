"""Decide which tokens of an example are run, and which examples share a packed micro batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.examples.tokens import Examples, FlatTokens
from vzip.templates.encode import IGNORED


def num_tail_tokens(tokens: FlatTokens, placeholders: Sequence[int]) -> np.ndarray:
    """int64[examples]: count the tokens at the end of each example whose output no loss needs.

    They are the last label, from which nothing is predicted, and everything behind it. Tokens of
    images and videos are always run, so the tail begins behind the last of them.

    Args:
        tokens: the examples.
        placeholders: ids of the tokens that stand for images and videos.
    """
    # The tail begins at the later of the two. Without media the second one is 0 or less, so the
    # last label decides.
    last_label = tokens.last(tokens.labels != IGNORED)
    behind_last_medium = tokens.last(np.isin(tokens.ids, placeholders)) + 1
    tails: np.ndarray = tokens.lengths - np.maximum(last_label, behind_last_medium)
    return tails


def shared_prefix(examples: Examples, placeholders: Sequence[int]) -> list[int]:
    """Return the ids that all examples with media begin with, up to the first placeholder.

    Neither a token of the prefix nor the one behind it is a label, so no loss needs the output of
    the prefix.

    Args:
        examples: the examples of a run.
        placeholders: ids of the tokens that stand for images and videos.
    """
    tokens = examples.flat_tokens()
    first_medium = tokens.first(np.isin(tokens.ids, placeholders))
    first_label = tokens.first(tokens.labels != IGNORED)

    # Examples of text alone do not count. A projector learns nothing from them: they are not run.
    has_media = first_medium < tokens.lengths
    if not has_media.any():
        return []

    # No label may follow the prefix's last token, because the output of that token is dropped.
    limit = int(np.minimum(first_medium, first_label - 1)[has_media].min())

    # Compare all examples at one position after the other, until two differ.
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
    """Number of the reducer that their images and videos go through."""


def pack(
    examples: Sequence[int],
    lengths: np.ndarray,
    *,
    tokens: int,
    world_size: int,
    seed: Sequence[int],
) -> list[MicroBatchSpec]:
    """Share examples out among micro batches, as few as possible and of similar size.

    Every rank gets the same number of micro batches. Examples are placed from the longest to the
    shortest, each into the micro batch that then has the fewest tokens. An example of more than
    `tokens` tokens gets a micro batch of its own.

    Args:
        examples: numbers of the examples to pack.
        lengths: int64[reducers, all examples], tokens of each example with each reducer. If there
            are several reducers, one is drawn for each micro batch.
        tokens: tokens that a micro batch may have.
        world_size: number of ranks, which take micro batches in turn.
        seed: integers that seed the draw of the reducers.
    """
    # Ties are broken by number, so the result does not depend on the order of the examples.
    longest_first = sorted(examples, key=lambda example: (-lengths[:, example].max(), example))

    # Start with the fewest rounds that could hold the tokens, whichever reducers are drawn.
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

        # Examples can't be cut, so they may not fit. Then each rank gets one more micro batch.
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
        # The reducer of a micro batch decides how many tokens the example would add to it.
        after = num_tokens + lengths[reducers, example]
        emptiest = int(after.argmin())
        num_tokens[emptiest] = after[emptiest]
        specs[emptiest].examples.append(example)

    return specs, num_tokens
