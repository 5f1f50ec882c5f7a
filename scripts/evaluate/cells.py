"""Cells of the results table. A cell is one task in one setting.

The harness runs the cells, and writes a file for each.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from scripts.evaluate.target import EvaluationSetting
from scripts.evaluate.tasks import HELD_OUT
from vzip.files import read_json_object
from vzip.runs.schema import NUMBER, NUMBERS, OBJECTS, TEXT, check_entries

FAILED_FILE = "failed"
"""File beside the job of several processes, if one of them fails.

It holds the number, from 1, of the cell that failed.
"""

_RESULT = {
    "num_visual_tokens": NUMBER,
    "seconds": NUMBER,
    "results": OBJECTS,
    "num_questions": NUMBERS,
    "table": TEXT,
    "prompt": TEXT,
}
"""Entries of a cell's file that the table shows, with their kinds."""


@dataclass(frozen=True)
class Cell:
    """One task in one setting."""

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

        Raises:
            UserError: the file is damaged.
        """
        path = Path(self.path)
        if not path.is_file():
            return None

        # Answers of another model, or to other questions, must not get into the table.
        advice = "delete it: the same command then asks this task again"
        result = read_json_object(path, advice=advice)
        if result.get("stamp") != self.stamp:
            return None
        check_entries(result, _RESULT, source=path, advice=advice)
        return result


@dataclass(frozen=True)
class Job:
    """The cells that one start of the harness runs, and how it loads the model."""

    arguments: dict[str, Any]
    """Arguments of lmms-eval's model "vzip"."""
    limit: int | None
    """Number of questions that are asked from each task. None for all."""
    include_path: str | None
    """Folder with the task of held-out questions, which lmms-eval does not have."""
    template: dict[str, Any] | None
    """Fields of a base model's chat template. None if its processor has one."""
    cells: list[Cell]

    def write(self, path: Path) -> None:
        """Write the job for the harness, which runs in another process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file from `write`."""
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
        settings: settings of the table.
        tasks: names of lmms-eval's tasks.
        questions: folder of the held-out questions, which come before the tasks. None to leave
            them out.
        folder: folder of the results. A cell's file is FOLDER/SETTING/TASK.json.
        stamp: what all cells depend on.
    """
    cells = []
    for setting in settings:
        for task in [HELD_OUT, *tasks]:
            # The stamp tells everything that changes the answers, so it also names the budget and,
            # for held-out questions, the folder that is named after their hash.
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
