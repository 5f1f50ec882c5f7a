"""Run lmms-eval on the cells of a job.

scripts/evaluate/main.py starts this in the environment of lmms-eval.

The model is loaded once for all cells. A cell's file is written when its task is done, so a
command that was stopped continues behind it. If a task fails, its error is printed, and the other
tasks are run.
"""

import argparse
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import make_table

from scripts.common.timing import where
from scripts.evaluate.cells import FAILED_FILE, Cell, Job
from scripts.evaluate.tasks import HELD_OUT
from train.cli import exit_on_user_error
from vzip import UserError
from vzip.files import write_json
from vzip.integrations.lmms_eval import NAME, Vzip
from vzip.runs.projector import budget_of
from vzip.templates.encode import Template
from vzip.templates.jinja import chat_template


def _answers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """List the answers by task and number of the question."""
    answers = []
    for task, samples in results["samples"].items():
        # Sort them: each of several processes has added its samples as a block.
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            answer = {
                "task": task,
                "question": sample["doc_id"],
                "answer": sample["filtered_resps"],
                "expected": sample["target"],
            }
            answers.append(answer)

    return answers


def _example_prompt(model: Vzip) -> str:
    """Return the prompt of a question about a picture, which the table shows."""
    content = [{"type": "image"}, {"type": "text", "text": "QUESTION"}]
    return model.answerer.prompt([{"role": "user", "content": content}])


def run_cell(model: Vzip, cell: Cell, manager: TaskManager, *, limit: int | None) -> None:
    """Run one task in one setting, and write the results of lmms-eval."""
    path = Path(cell.path)
    path.parent.mkdir(parents=True, exist_ok=True)

    # Switch the model, which is loaded once, to the cell's setting.
    model.answerer.switch_to(cell.row, budget=cell.budget)
    comparison = model.answerer.comparison
    reducer = comparison.reducer(cell.row, budget=cell.budget)

    start = time.perf_counter()
    results = simple_evaluate(
        model=model,
        tasks=[cell.task],
        task_manager=manager,
        limit=limit,
        batch_size=model.batch_size,
        # Our table has no standard errors, and 100,000 bootstrap samples would take minutes.
        bootstrap_iters=0,
        # Tasks look here for two options: where to put files for other judges, and whether to open
        # the pictures again for grading.
        cli_args=argparse.Namespace(output_path=str(path.parent), process_with_media=False),
    )
    seconds = time.perf_counter() - start

    # If there are several processes, only the first one gets the results.
    if results is None:
        return

    # The stamp tells a later command whether it can use this file.
    content = {
        "stamp": cell.stamp,
        "row": cell.name,
        "num_visual_tokens": budget_of(comparison.family, reducer),
        "seconds": round(seconds, 1),
        "num_processes": model.world_size,
        "prompt": _example_prompt(model),
        "results": results["results"],
        "num_questions": {task: each["effective"] for task, each in results["n-samples"].items()},
        "table": make_table(results),
        "where": {**where(model.device), "lmms-eval": version("lmms-eval")},
        "answers": _answers(results),
    }
    write_json(path, content)


def load_tasks(names: set[str], *, include_path: str | None) -> TaskManager:
    """Load lmms-eval's tasks, and those of a folder.

    Raises UserError if one of the names does not exist.
    """
    # Listing lmms-eval's own tasks takes seconds, so leave them out if only held-out questions are
    # asked.
    has_others = names != {HELD_OUT}
    manager = TaskManager(
        "WARNING",
        include_path=include_path,
        include_defaults=has_others,
        model_name=NAME,
    )

    unknown = names - set(manager.all_tasks)
    if unknown:
        raise UserError(
            f"--tasks {', '.join(sorted(unknown))}: lmms-eval has no such task; "
            "give names of its `--tasks list`"
        )
    return manager


@exit_on_user_error
def main() -> None:
    """Run all cells of the job whose path is the only argument."""
    # Look for the tasks first, so that an unknown name is reported before the model is loaded.
    path = Path(sys.argv[1])
    job = Job.read(path)
    manager = load_tasks({cell.task for cell in job.cells}, include_path=job.include_path)

    # A base model gets the template of its recipe, so that it can be compared with a run.
    model = Vzip(**job.arguments)
    if job.template:
        processor = model.answerer.comparison.processor
        processor.chat_template = chat_template(Template(**job.template), processor.tokenizer)

    has_failed = False
    for number, cell in enumerate(job.cells, start=1):
        if model.rank == 0:
            print(f"[{number}/{len(job.cells)}] {cell.name}, {cell.task}", flush=True)
        # A task runs code of its own, so it may raise anything.
        try:
            run_cell(model, cell, manager, limit=job.limit)
        except Exception:
            # The other processes wait for this one. End all of them: the command starts them again
            # behind this cell.
            if model.world_size > 1:
                path.with_name(FAILED_FILE).write_text(str(number))
                raise
            traceback.print_exc()
            has_failed = True

    sys.exit(1 if has_failed else 0)


if __name__ == "__main__":
    main()
