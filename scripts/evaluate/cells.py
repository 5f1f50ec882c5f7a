"""Cells of the results table: one setting that is asked one task.

The harness runs the cells, and writes a file for each.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from scripts.evaluate.target import EvaluationSetting
from scripts.evaluate.tasks import HELD_OUT

FAILED_FILE = "failed"
"""File beside the job of several processes.

It holds the number, from 1, of the cell in which one of them failed.
"""


@dataclass(frozen=True)
class Cell:
    """One setting asked one task."""

    name: str
    """Name of the setting in the table, e.g. "tuned-64"."""
    row: str
    """Setting of `vzip.Comparison`: "full", "free" or "tuned"."""
    budget: int | None
    task: str
    path: str
    """File that the harness writes when the task is done."""
    stamp: dict[str, Any]
    """Everything the answers depend on. A file with another stamp is not used."""

    def result(self) -> dict[str, Any] | None:
        """Read the cell's file.

        Return None if there is no file, or it was made with other settings.
        """
        path = Path(self.path)
        if not path.is_file():
            return None

        result: dict[str, Any] = json.loads(path.read_text())
        return result if result.get("stamp") == self.stamp else None


@dataclass(frozen=True)
class Job:
    """The work of one start of the harness."""

    arguments: dict[str, Any]
    """Arguments of lmms-eval's model "vzip"."""
    limit: int | None
    """Number of questions asked of each task. None for all."""
    include_path: str | None
    """Folder with a task of our own."""
    template: dict[str, Any] | None
    """Fields of the template that a base model is asked in. None if its processor has one."""
    cells: list[Cell]

    def write(self, path: Path) -> None:
        """Write the job for the harness, which runs in another process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` has written."""
        content = json.loads(path.read_text())
        cells = [Cell(**cell) for cell in content.pop("cells")]
        return cls(**content, cells=cells)


def make_cells(
    settings: Sequence[EvaluationSetting],
    tasks: Sequence[str],
    *,
    questions: Path | None,
    folder: Path,
    stamp: dict[str, Any],
) -> list[Cell]:
    """List the cells of a table, setting by setting.

    Args:
        settings: rows of the table.
        tasks: names of lmms-eval's tasks.
        questions: folder of the held-out questions, which come before the tasks. None to leave
            them out.
        folder: folder of the results. A cell's file is FOLDER/SETTING/TASK.json.
        stamp: what all cells depend on.
    """
    cells = []
    for setting in settings:
        for task in [HELD_OUT, *tasks]:
            # Other budgets, or other questions, make other answers.
            own_stamp = {**stamp, "budget": setting.budget}
            if task == HELD_OUT:
                if questions is None:
                    continue
                own_stamp["questions"] = questions.name

            cell = Cell(
                name=setting.name,
                row=setting.row,
                budget=setting.budget,
                task=task,
                path=str(folder / setting.name / f"{task}.json"),
                stamp=own_stamp,
            )
            cells.append(cell)

    return cells
