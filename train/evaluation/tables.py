"""The table of a run's scores, for terminals, and in Markdown for reports and model cards.

A table has one line per setting: `full` (all visual tokens), `free` (reduced, training-free),
`tuned` (reduced, with the tuned projector) and `random` (random tokens, tuned). Settings of
a run with several budgets are named `free-64`, `tuned-64` and so on. The scores are those under
"rows" in result.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

# Stands below the table in model cards.
LEGEND = (
    "Share of held-out questions answered as expected. `full`: all visual tokens; `free`: reduced, "
    "training-free; `tuned`: reduced, with the tuned projector; `random`: as many random tokens, with "
    "a projector tuned for them."
)


@dataclass(frozen=True)
class ScoreTable:
    """Cells of text under their headers. The first column is text, the others are numbers."""

    header: list[str]
    lines: list[list[str]]

    def rich(self, title: str | None = None) -> Table:
        """Make the table for a terminal."""
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for line in self.lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """Write the table in Markdown, without a line end behind it."""
        # The ruler aligns the columns: text on the left, numbers on the right.
        ruler = ["---"] + ["--:"] * (len(self.header) - 1)
        lines = [self.header, ruler, *self.lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def score_kinds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the kinds of questions that were asked, "all" last."""
    return list(rows[0]["metrics"]) if rows else []


def score_table(rows: Sequence[Mapping[str, Any]]) -> ScoreTable:
    """Make the table of scores: the share of correct answers, and in brackets per cent of `full`.

    Args:
        rows: the settings in result.json, each with "name", "num_visual_tokens", "num_questions"
            and "metrics".
    """
    # Find the scores that the per cents refer to. A run without baselines has none.
    kinds = score_kinds(rows)
    full: Mapping[str, float] = {}
    for row in rows:
        if row["name"] == "full":
            full = row["metrics"]

    # One line per setting. `full` needs no per cents, and nothing can be divided by a score of 0.
    lines = []
    for row in rows:
        line = [row["name"], f"{row['num_visual_tokens']:,}", f"{row['num_questions']:,}"]
        for kind in kinds:
            share = row["metrics"][kind]
            cell = format_share(share)
            if row["name"] != "full" and full.get(kind):
                cell += f" ({share / full[kind]:.0%})"
            line.append(cell)
        lines.append(line)
    return ScoreTable(["setting", "visual tokens", "questions", *kinds], lines)


def format_share(share: float) -> str:
    """Format a share with three digits and no leading zero: .935, 1.000."""
    return f"{share:.3f}".removeprefix("0")


def gap_closed(rows: Sequence[Mapping[str, Any]], kind: str, *, suffix: str = "") -> float | None:
    """Compute the share of the gap from `free` to `full` that tuning closes. None without a gap.

    Args:
        rows: the settings in result.json.
        kind: kind of questions.
        suffix: what the names of `free` and `tuned` end with in a run with several budgets, e.g. "-64".
    """
    # `full` has no budget, so all budgets compare with the same one.
    share_by_name = {row["name"]: row["metrics"].get(kind) for row in rows}
    full = share_by_name.get("full")
    free = share_by_name.get(f"free{suffix}")
    tuned = share_by_name.get(f"tuned{suffix}")

    # Without a baseline, or if the reduced model is as good as the full one, nothing can be closed.
    if full is None or free is None or tuned is None or full <= free:
        return None
    return float((tuned - free) / (full - free))


def print_results(rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Print the table of scores, and how much of the gap tuning closes.

    Args:
        rows: the settings in result.json.
        title: the run's folder.
    """
    if not rows:
        print(f"{title}: tuned; no questions were asked, `make eval RUN={title}` asks those of lmms-eval")
        return

    # Without wrapping, so that the path can be copied from the terminal.
    console = Console()
    console.print(title, soft_wrap=True, highlight=False)
    console.print(score_table(rows).rich())

    # Below the table, the result in one line for each kind of question and each budget.
    tuned_names = [row["name"] for row in rows if row["name"].startswith("tuned")]
    for kind in score_kinds(rows):
        for name in tuned_names:
            suffix = name.removeprefix("tuned")
            share = gap_closed(rows, kind, suffix=suffix)
            if share is not None:
                console.print(f"{kind}: tuning closes {share:.0%} of the gap between free{suffix} and full")
