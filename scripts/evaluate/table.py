"""The table of an evaluation: a line for each setting, with the paper's scores below ours.

A cell has the score in points, and in brackets its share of the score of `full`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console

from scripts.evaluate.cells import Cell
from scripts.evaluate.tasks import PAPER, scores_of
from train.evaluation.tables import ScoreTable

FinishedCell = tuple[Cell, Mapping[str, Any]]
"""A cell, and the content of the file that the harness wrote for it."""


def _merge_cells(cells: Sequence[FinishedCell]) -> list[dict[str, Any]]:
    """Merge the cells of each setting into one row of results.json."""
    rows: dict[str, dict[str, Any]] = {}
    for cell, result in cells:
        # The first cell of a setting starts its row.
        if cell.name not in rows:
            rows[cell.name] = {
                "name": cell.name,
                "row": cell.row,
                "num_visual_tokens": result["num_visual_tokens"],
                "scores": {},
                "num_questions": {},
                "seconds": 0.0,
            }

        # Every cell adds the columns of its task.
        row = rows[cell.name]
        row["scores"] |= scores_of(result["results"])
        row["num_questions"] |= result["num_questions"]
        row["seconds"] = round(row["seconds"] + result["seconds"], 1)

    return list(rows.values())


def _paper_rows(
    rows: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the published rows with the same setting and budget as ours, under our names."""
    # A budget that the paper does not report has no row of the paper.
    paper = []
    for row in rows:
        for published_row in published:
            same_setting = published_row["row"] == row["row"]
            if same_setting and published_row["num_visual_tokens"] == row["num_visual_tokens"]:
                paper.append({**published_row, "name": row["name"]})

    return paper


def _add_percent_of_full(rows: Sequence[dict[str, Any]], asked: Mapping[str, Collection[str]]) -> None:
    """Add "percent_of_full" to each row, by column, and their mean as "average_percent".

    The mean is taken over the paper's tasks alone.

    Args:
        rows: rows of the table. One of them is `full`, if there is anything to compare with.
        asked: by name of a row, the columns that count in the mean.
    """
    # An export has no setting `full`. Then there are no shares.
    scores_of_full = [row["scores"] for row in rows if row["row"] == "full"]
    full = scores_of_full[0] if scores_of_full else {}

    paper_columns = {task.column for task in PAPER}

    for row in rows:
        # A column has a share only if `full` has a score in it.
        shares = {}
        for column, score in row["scores"].items():
            if full.get(column):
                shares[column] = 100 * score / full[column]
        row["percent_of_full"] = shares

        # The mean of the shares, over the paper's tasks alone.
        counted = [
            share
            for column, share in shares.items()
            if column in paper_columns and column in asked[row["name"]]
        ]
        row["average_percent"] = sum(counted) / len(counted) if counted else None


def table_of(cells: Sequence[FinishedCell], published: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make the table of finished cells.

    Args:
        cells: finished cells, in the order of the settings.
        published: what the paper reports for the same model. Empty if it does not report the model.

    Returns:
        "rows": one for each setting, with "name", "row", "num_visual_tokens", "scores",
            "percent_of_full", "average_percent", "num_questions" and "seconds".
        "paper": the published rows beside ours, with the same keys.
        "tables": lmms-eval's own tables, as text.
        "prompt": the prompt of a question, with the model's chat template.
    """
    rows = _merge_cells(cells)
    paper = _paper_rows(rows, published)

    # Average the paper's scores over the tasks that ran here: over all of the paper's tasks, the
    # number could not be compared with ours.
    asked = {row["name"]: row["scores"] for row in rows}
    _add_percent_of_full(rows, asked)
    _add_percent_of_full(paper, asked)

    _, last_result = cells[-1]
    return {
        "rows": rows,
        "paper": paper,
        "tables": {f"{cell.name}, {cell.task}": result["table"] for cell, result in cells},
        "prompt": last_result["prompt"],
    }


def _score_text(row: Mapping[str, Any], column: str) -> str:
    """Format a score and its share of `full`, e.g. "54.0 (90%)"."""
    # A setting may not have run every task.
    if column not in row["scores"]:
        return ""

    text = f"{row['scores'][column]:.1f}"
    share = row["percent_of_full"].get(column)
    return text if share is None else f"{text} ({share:.0f}%)"


def _line(
    name: str,
    row: Mapping[str, Any],
    columns: Sequence[str],
    *,
    has_average: bool,
) -> list[str]:
    """Format one line of the printed table."""
    line = [name, str(row["num_visual_tokens"])]
    line += [_score_text(row, column) for column in columns]

    if has_average:
        average = row["average_percent"]
        line.append("" if average is None else f"{average:.1f}%")

    # The paper does not say how long its evaluation took.
    line.append(f"{row['seconds']:.0f}" if "seconds" in row else "")
    return line


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the columns in the order of their tasks. Totals come last."""
    # A dict keeps the order, and the sort keeps it too: it only moves the totals.
    columns = list(dict.fromkeys(column for row in rows for column in row["scores"]))
    return sorted(columns, key=lambda column: column.endswith(": all"))


def print_scores(table: Mapping[str, Any], *, title: str) -> None:
    """Print lmms-eval's own tables, then ours."""
    console = Console()
    for name, text in table["tables"].items():
        console.print(f"{name}\n{text}", markup=False, highlight=False, soft_wrap=True)

    # The average exists only if one of the paper's tasks has run.
    columns = _columns(table["rows"])
    has_average = any(row["average_percent"] is not None for row in table["rows"])
    header = ["setting", "tokens", *columns]
    if has_average:
        header.append("average of full")
    header.append("seconds")

    # Below each of our lines stands the paper's, if the paper reports the same setting.
    lines = []
    for row in table["rows"]:
        lines.append(_line(row["name"], row, columns, has_average=has_average))
        for paper_row in table["paper"]:
            if paper_row["name"] == row["name"]:
                lines.append(_line("  paper", paper_row, columns, has_average=has_average))

    console.print(ScoreTable(header, lines).rich(title))
    console.print(f"prompt: {table['prompt']!r}", markup=False, highlight=False, soft_wrap=True)
