"""The table of an evaluation: rows over tasks, in points and per cent of `full`, the paper's row below ours."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.evaluate.tasks import PAPER, scores_of

Cell = tuple[Mapping[str, Any], Mapping[str, Any]]
"""What was asked, as scripts/evaluate/main.py says it to the harness, and what the harness wrote."""


def _of_full(rows: Sequence[dict[str, Any]], columns: Mapping[str, Collection[str]]) -> None:
    """Give each row its scores in per cent of `full`, and their mean over those of `columns`, by its name, that are the
    paper's tasks, if there are any.
    """
    full = next((row["scores"] for row in rows if row["row"] == "full"), {})
    paper = {task.column for task in PAPER}
    for row in rows:
        shares = {name: 100 * value / full[name] for name, value in row["scores"].items() if full.get(name)}
        row["percent_of_full"] = shares
        counted = [value for name, value in shares.items() if name in paper and name in columns[row["name"]]]
        row["average_percent"] = sum(counted) / len(counted) if counted else None


def _ours(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for cell, found in cells:
        empty = {"name": cell["name"], "row": cell["row"], "num_visual_tokens": found["num_visual_tokens"]}
        row = rows.setdefault(cell["name"], {**empty, "scores": {}, "num_questions": {}, "seconds": 0.0})
        row["scores"] |= scores_of(found["results"])
        row["num_questions"] |= found["num_questions"]
        row["seconds"] = round(row["seconds"] + found["seconds"], 1)
    return list(rows.values())


def table_of(cells: Sequence[Cell], published: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of finished cells.

    Args:
        cells: in the order of the rows.
        published: the paper's rows of the same model, if it has any.

    Returns:
        "rows", each with "name", "row", "num_visual_tokens", "scores", "percent_of_full", "average_percent", "num_questions"
        and "seconds"; "paper", the published rows beside them, alike, each under the "name" of ours; lmms-eval's own "tables";
        and the "prompt" that a question is asked in.
    """
    rows = _ours(cells)
    paper = []
    for row in rows:
        for theirs in published:
            if theirs["row"] == row["row"] and theirs["num_visual_tokens"] == row["num_visual_tokens"]:
                paper.append({**theirs, "name": row["name"]})
    ours = {row["name"]: row["scores"] for row in rows}
    for each in (
        rows,
        paper,
    ):  # theirs is the mean over what we asked too: one over all of their tasks is another thing
        _of_full(each, ours)
    tables = {f"{cell['name']}, {cell['task']}": found["table"] for cell, found in cells}
    return {"rows": rows, "paper": paper, "tables": tables, "prompt": cells[-1][1]["prompt"]}


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row["scores"]:
        return ""
    share = row["percent_of_full"].get(column)
    return f"{row['scores'][column]:.1f}" + ("" if share is None else f" ({share:.0f}%)")


def print_scores(table: Mapping[str, Any], *, title: str) -> None:
    """Print lmms-eval's tables, and ours."""
    console = Console()
    for name, text in table["tables"].items():
        console.print(f"{name}\n{text}", markup=False, highlight=False, soft_wrap=True)
    columns = list(dict.fromkeys(column for row in table["rows"] for column in row["scores"]))
    columns.sort(key=lambda column: column.endswith(": all"))
    averaged = ["average of full"] if any(row["average_percent"] is not None for row in table["rows"]) else []
    shown = Table("row", "tokens", *columns, *averaged, "seconds", title=title, title_justify="left")
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in table["rows"]:
        for each in (row, *(theirs for theirs in table["paper"] if theirs["name"] == row["name"])):
            cells = [row["name"] if each is row else "  paper", str(each["num_visual_tokens"])]
            cells += [_text(each, column) for column in columns]
            cells += [
                "" if each["average_percent"] is None else f"{each['average_percent']:.1f}%" for _ in averaged
            ]
            shown.add_row(*cells, f"{each['seconds']:.0f}" if "seconds" in each else "")
    console.print(shown)
    console.print(f"asked as {table['prompt']!r}", markup=False, highlight=False, soft_wrap=True)
