"""How many examples may be unusable, and the messages for more of them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from data.conversations import BadExample
from data.examples.subset import DrawnSubset
from vzip import UserError

MAX_BAD_SHARE = 0.01
"""Training is refused if more than this share of the examples can't be used."""
NUM_IN_ERROR = 5
"""Examples that an error message names."""


def first_lines(reasons: Iterable[tuple[str, str]]) -> str:
    """The first `NUM_IN_ERROR` of (name, reason) pairs, one a line, for an error message."""
    return "\n".join(f"  {name}: {reason}" for name, reason in islice(reasons, NUM_IN_ERROR))


def check_bad_share(bad: Sequence[BadExample], num_examples: int) -> None:
    """Raise UserError, with counts by source, if more than `MAX_BAD_SHARE` of the examples are bad."""
    if len(bad) <= MAX_BAD_SHARE * num_examples:
        return

    by_source = Counter(example.source for example in bad)
    counts = ", ".join(f"{source}: {count}" for source, count in sorted(by_source.items()))
    first_ones = first_lines((example.id, example.reason) for example in bad)
    raise UserError(
        f"{len(bad)} of {num_examples} examples can't be used ({counts}); at most {MAX_BAD_SHARE:.0%} may be bad. "
        f"First ones:\n{first_ones}\n"
        f"Repair them, or take them out of data.path. If all pictures are missing, check data.image_folder; "
        f"`make data` fetches pictures from the addresses in data.pictures."
    )


def check_lost_sources(
    drawn: DrawnSubset,
    positions: Sequence[int],
    left_out: Sequence[dict[str, Any]],
) -> None:
    """Raise UserError for a data source that lost most of its examples.

    That means that its setting is wrong, or its server is gone.
    """
    # A few lost examples of a large data set are no reason to stop, even if they are a whole source.
    usable = set(positions)
    for source, num_wanted in drawn.wanted.items():
        num_usable = len(usable.intersection(drawn.candidates[source]))
        num_lost = num_wanted - num_usable
        if num_usable >= num_wanted / 2 or num_lost <= MAX_BAD_SHARE * drawn.num_wanted:
            continue

        reasons = []
        for example in left_out:
            if example["source"] == source:
                reasons.append((example["id"], example["reason"]))
        raise UserError(
            f"of {source} only {num_usable:,} of {num_wanted:,} examples can be used; check data.pictures.{source} and "
            f"data.image_folder, or leave the source out with data.sources. First ones:\n{first_lines(reasons)}"
        )
