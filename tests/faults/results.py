"""The table of a campaign: on the screen, and in RESULTS.md between markers."""

import torch

from tests.faults.campaign import Tally
from train.hardware import current_environment
from vzip import UserError

BEGIN = "<!-- faults: written by `make faults` -->"
END = "<!-- end of faults -->"


def as_table(tallies: list[Tally], seed: int) -> str:
    """Write the table in Markdown: tried, survived and failed by campaign, with the failures below."""
    environment = current_environment(torch.device("cpu"))
    lines = [
        f"`make faults`, seed {seed}: {environment.date}, commit {environment.short_commit}, "
        f"{environment.num_cpus} cores of {environment.device}.",
        "",
        "| campaign | tried | survived | failed | seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    for tally in tallies:
        failed = len(tally.failures)
        name = f"{tally.campaign.name} (of {tally.campaign.count})"
        lines.append(f"| {name} | {tally.tried} | {tally.tried - failed} | {failed} | {tally.seconds:.0f} |")

    failures = [failure for tally in tallies for failure in tally.failures]
    if failures:
        lines += ["", *[f"- {failure.replace('|', '/')}" for failure in failures]]
    return "\n".join(lines)


def insert(text: str, table: str) -> str:
    """Put the table into the text of RESULTS.md, in place of the last one.

    Raises:
        UserError: the text has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the results file needs a line {BEGIN!r}, and behind it {END!r}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
