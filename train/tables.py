"""The table of a run's scores, for terminals, and in Markdown for reports and model cards.

A table has one line per setting: `full` (all visual tokens), `free` (reduced, training-free), `tuned` (reduced, with the
tuned projector) and `random` (as many random tokens, tuned). Settings of a run with several budgets are named `free-64`,
`tuned-64` and so on. The scores are those under "rows" in result.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

LEGEND = (
    "Share of held-out questions answered as expected. `full`: all visual tokens; `free`: reduced, training-free; "
    "`tuned`: reduced, with the tuned projector; `random`: as many random tokens, with a projector tuned for them."
)


@dataclass(frozen=True)
class ScoreTable:
    """Cells of text under their headers. The first column is text, the others are numbers."""

    header: list[str]
    lines: list[list[str]]

    def rich(self, title: str | None = None) -> Table:
        """The table for a terminal."""
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for line in self.lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """The table in Markdown, without a line end behind it."""
        ruler = ["---"] + ["--:"] * (len(self.header) - 1)
        lines = [self.header, ruler, *self.lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def score_kinds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of questions that were asked, "all" last."""
    return list(rows[0]["metrics"]) if rows else []


def score_table(rows: Sequence[Mapping[str, Any]]) -> ScoreTable:
    """The table of scores: for each kind of question the share of correct answers, and that share relative to `full`.

    Args:
        rows: the settings in result.json, each with "name", "num_visual_tokens", "num_questions" and "metrics".
    """
    kinds = score_kinds(rows)
    full: Mapping[str, float] = {}
    for row in rows:
        if row["name"] == "full":
            full = row["metrics"]

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
    """A share with three digits and no leading zero: .935, 1.000."""
    return f"{share:.3f}".removeprefix("0")
