"""A small slice of the campaign of faults, and how it counts."""

import random
import sys

import pytest

from tests.faults import results
from tests.faults.campaign import Campaign, run_campaign
from tests.helpers.commands import start
from vzip import UserError

pytestmark = pytest.mark.integration


class Nowhere:
    """A world without a model, for trials that need none."""

    description = ""

    def clean_up(self):
        pass


def odd_numbers_fail(world, rng, number):
    world.description = f"drew {rng.randrange(1000)}"
    if number % 2:
        raise AssertionError("it was\nodd")


def test_failures_are_counted_named_and_repeatable(capsys):
    campaign = Campaign("odd", odd_numbers_fail, count=5, share=1)
    tally = run_campaign(campaign, Nowhere(), seed=7, numbers=range(5), seconds=60)
    drawn = random.Random("7-odd-3").randrange(1000)
    assert tally.tried == 5 and len(tally.failures) == 2
    assert tally.failures[1] == (
        f"FAILED odd 3 (drew {drawn}): it was odd [python -m tests.faults --only odd --seed 7 --trial 3]"
    )
    assert capsys.readouterr().out.count("FAILED") == 2
    assert run_campaign(campaign, Nowhere(), seed=7, numbers=range(5), seconds=-1).tried == 0

    table = results.as_table([tally], 7)
    assert "| odd (of 5) | 5 | 3 | 2 |" in table and "- FAILED odd 1" in table
    before = f"# Results\n\n{results.BEGIN}\nold\n{results.END}\n\n## Runs\n"
    after = f"# Results\n\n{results.BEGIN}\n\n{table}\n\n{results.END}\n\n## Runs\n"
    assert results.insert(before, table) == after
    with pytest.raises(UserError, match="needs a line"):
        results.insert("# Results\n", table)


def test_a_slice_of_the_campaign_is_survived():
    """A trial of each, and more if there is time."""
    chosen = [word for name in ("kill", "disk", "examples", "special") for word in ("--only", name)]
    done = start([sys.executable, "-m", "tests.faults", *chosen, "--budget", "4"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "| kill (of 20) |" in done.stdout
