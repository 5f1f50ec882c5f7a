"""Run the campaigns: `python -m tests.faults --only kill --budget 60`. See the package for what they mean."""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from data.paths import ROOT
from tests.faults import results
from tests.faults.campaign import Campaign, run_campaign
from tests.faults.examples import examples
from tests.faults.kills import kill, signals, together
from tests.faults.servers import servers
from tests.faults.storage import corrupt, disk, special, unmount
from tests.faults.strangers import TRICKS, strangers
from tests.faults.world import World
from train.cli import exit_on_user_error
from vzip.files import atomic_write

CAMPAIGNS = [
    Campaign("kill", kill, count=20, share=350),
    Campaign("signals", signals, count=8, share=80),
    Campaign("together", together, count=4, share=40),
    Campaign("disk", disk, count=8, share=60),
    Campaign("corrupt", corrupt, count=24, share=120),
    Campaign("examples", examples, count=300, share=80),
    Campaign("servers", servers, count=17, share=50),
    Campaign("strangers", strangers, count=len(TRICKS), share=80),
    Campaign("special", special, count=16, share=40),
]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    names = [campaign.name for campaign in CAMPAIGNS]
    parser.add_argument("--only", choices=names, action="append", help="campaign to run; may be repeated")
    parser.add_argument("--budget", type=float, default=900, help="seconds for all of them")
    parser.add_argument("--seed", type=int, default=0, help="what all random numbers follow from")
    parser.add_argument("--trial", type=int, help="number of the only trial to run, with --only")
    parser.add_argument("--results", type=Path, default=ROOT / "RESULTS.md", help="file for the table")
    return parser.parse_args(arguments)


@exit_on_user_error
def main() -> None:
    arguments = parse(sys.argv[1:])
    chosen = [campaign for campaign in CAMPAIGNS if campaign.name in (arguments.only or campaign.name)]
    all_shares = sum(campaign.share for campaign in chosen)

    # Killed processes leave semaphores, which Python tidies up with a warning.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    # In the background or under nohup, signals are ignored, and processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    tallies = []
    with tempfile.TemporaryDirectory(prefix="vzip-faults-") as folder:
        os.environ["VZIP_DATA"] = str(Path(folder, "vzip"))
        world = World(Path(folder))
        try:
            for campaign in chosen:
                tally = run_campaign(
                    campaign,
                    world,
                    seed=arguments.seed,
                    numbers=range(campaign.count) if arguments.trial is None else [arguments.trial],
                    seconds=arguments.budget * campaign.share / all_shares,
                )
                failed = len(tally.failures)
                print(f"{campaign.name}: {tally.tried} tried, {failed} failed", flush=True)
                tallies.append(tally)
        finally:
            unmount(world)

    # Only a run of all campaigns goes into the results file.
    table = results.as_table(tallies, arguments.seed)
    print(table)
    if len(chosen) == len(CAMPAIGNS) and arguments.trial is None:
        text = results.insert(arguments.results.read_text(encoding="utf-8"), table)
        with atomic_write(arguments.results) as scratch:
            scratch.write_text(text, encoding="utf-8")
    sys.exit(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    main()
