"""Campaigns and their trials: they run one after the other, each for its share of the time."""

import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.faults.world import World

Trial = Callable[[World, random.Random, int], None]
"""Does one trial, given its random numbers and its own number. Raises if it is not survived."""


@dataclass(frozen=True)
class Campaign:
    """Trials of one kind.

    Attributes:
        name: what `--only` calls it.
        trial: does one of them.
        count: how many there are.
        share: seconds that they take on two idle cores, about.
    """

    name: str
    trial: Trial
    count: int
    share: float


@dataclass
class Tally:
    """What came of a campaign.

    Attributes:
        campaign: the campaign.
        tried: how many trials ended, in time or not.
        failures: one line for each trial that was not survived.
        seconds: how long it took.
    """

    campaign: Campaign
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_campaign(
    campaign: Campaign, world: World, *, seed: int, numbers: Sequence[int], seconds: float
) -> Tally:
    """Run trials of a campaign, as many as the time allows. A trial that has begun is finished.

    Args:
        campaign: the campaign.
        world: where it happens.
        seed: what all random numbers follow from.
        numbers: the trials to run.
        seconds: no trial begins after so many.
    """
    tally = Tally(campaign)
    start = time.monotonic()
    for number in numbers:
        if time.monotonic() - start > seconds:
            break

        # A trial's numbers do not depend on the trials before it, so that it can be repeated alone.
        world.description = ""
        try:
            campaign.trial(world, random.Random(f"{seed}-{campaign.name}-{number}"), number)
        except Exception as error:
            tally.failures.append(_failure(campaign, world, error, seed=seed, number=number))
            print(tally.failures[-1], flush=True)
        tally.tried += 1
        world.clean_up()

    tally.seconds = time.monotonic() - start
    return tally


def _failure(campaign: Campaign, world: World, error: Exception, *, seed: int, number: int) -> str:
    """Write the line about a trial that failed: what was done, what came of it, how to repeat it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(str(error).split())[:300] or f"{type(error).__name__} at {where.name}:{where.lineno}"
    again = f"--only {campaign.name} --seed {seed} --trial {number}"
    return f"FAILED {campaign.name} {number} ({world.description}): {reason} [python -m tests.faults {again}]"
