"""Limits for unusable examples, and the errors of data that exceeds them."""

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
"""Number of examples that an error message names."""


def first_lines(reasons: Iterable[tuple[str, str]]) -> str:
    """Format the first `NUM_IN_ERROR` (name, reason) pairs for an error message, one a line."""
    return "\n".join(f"  {name}: {reason}" for name, reason in islice(reasons, NUM_IN_ERROR))


def check_bad_share(bad: Sequence[BadExample], num_examples: int) -> None:
    """Raise UserError, with counts by source, if more than `MAX_BAD_SHARE` are bad."""
    # Every large data set has a few bad examples. Many of them mean that a setting is wrong.
    if len(bad) <= MAX_BAD_SHARE * num_examples:
        return

    # The counts show whether one source is missing, or single pictures everywhere.
    by_source = Counter(example.source for example in bad)
    counts = ", ".join(f"{source}: {count}" for source, count in sorted(by_source.items()))
    first_ones = first_lines((example.id, example.reason) for example in bad)
    raise UserError(
        f"{len(bad)} of {num_examples} examples can't be used ({counts}); "
        f"at most {MAX_BAD_SHARE:.0%} may be bad. The first ones:\n{first_ones}\n"
        f"Repair them, or take them out of data.path. If all pictures are missing, check "
        f"data.image_folder. `make data` fetches pictures from the addresses in data.pictures."
    )


def check_lost_sources(
    drawn: DrawnSubset,
    positions: Sequence[int],
    left_out: Sequence[dict[str, Any]],
) -> None:
    """Raise UserError if a data source lost most of its examples.

    Then its setting is wrong, or its server is gone.
    """
    usable = set(positions)
    for source, num_wanted in drawn.wanted.items():
        # A small source may be lost as a whole: a few missing examples do not spoil a run.
        num_usable = len(usable.intersection(drawn.candidates[source]))
        num_lost = num_wanted - num_usable
        if num_usable >= num_wanted / 2 or num_lost <= MAX_BAD_SHARE * drawn.num_wanted:
            continue

        # The reasons of this source alone: those of others would not explain its loss.
        reasons = []
        for example in left_out:
            if example["source"] == source:
                reasons.append((example["id"], example["reason"]))
        raise UserError(
            f"only {num_usable:,} of {num_wanted:,} examples of {source} can be used; "
            f"check data.pictures.{source} and data.image_folder, "
            f"or leave the source out with data.sources. The first ones:\n{first_lines(reasons)}"
        )
