"""Run lmms-eval on cells of a table, one row and one task each. Started by scripts/evaluate/main.py, in the environment of lmms-eval.

The model is loaded once. A cell's file is written when its task is done, so that a command that was stopped goes on from there;
a task that fails is said, and the others are run.
"""

import argparse
import json
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import make_table

from data.paths import write_json
from scripts.common.timing import where
from scripts.evaluate.tasks import FAILED, TASK
from train.cli import exit_on_user_error
from vzip import UserError
from vzip.integrations.lmms_eval import NAME, Vzip
from vzip.runs.projector import budget_of
from vzip.templates.encode import Template
from vzip.templates.jinja import chat_template


def _answers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was answered to each question, by task and number."""
    return [
        {
            "task": task,
            "question": sample["doc_id"],
            "answer": sample["filtered_resps"],
            "expected": sample["target"],
        }
        for task, samples in results["samples"].items()
        for sample in sorted(
            samples, key=lambda sample: sample["doc_id"]
        )  # of several processes one comes after the other
    ]


def run_cell(model: Vzip, cell: dict[str, Any], manager: TaskManager, *, limit: int | None) -> None:
    """Ask a row one task, and write what lmms-eval says of it."""
    path = Path(cell["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    model.answerer.take(cell["row"], budget=cell["budget"])
    reducer = model.answerer.comparison.reducer(cell["row"], budget=cell["budget"])
    start = time.perf_counter()
    asked_as = model.answerer.prompt(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QUESTION"}]}]
    )
    results = simple_evaluate(
        model=model,
        tasks=[cell["task"]],
        task_manager=manager,
        limit=limit,
        batch_size=model.batch_size,
        bootstrap_iters=0,
        # What tasks ask of the command line: where files for other judges go, and whether grading opens pictures again.
        cli_args=argparse.Namespace(output_path=str(path.parent), process_with_media=False),
    )
    if results is None:  # the first of several processes has them
        return
    write_json(
        path,
        {
            "stamp": cell["stamp"],
            "row": cell["name"],
            "num_visual_tokens": budget_of(model.answerer.comparison.family, reducer),
            "seconds": round(time.perf_counter() - start, 1),
            "num_processes": model.world_size,
            "prompt": asked_as,
            "results": results["results"],
            "num_questions": {task: counts["effective"] for task, counts in results["n-samples"].items()},
            "table": make_table(results),
            "where": {**where(model.device), "lmms-eval": version("lmms-eval")},
            "answers": _answers(results),
        },
    )


def tasks_of(names: set[str], *, include_path: str | None) -> TaskManager:
    """lmms-eval's tasks, and those of a folder. Raises UserError if one of the names is not among them."""
    manager = TaskManager(
        "WARNING", include_path=include_path, include_defaults=names != {TASK}, model_name=NAME
    )
    if unknown := names - set(manager.all_tasks):
        raise UserError(
            f"--tasks {', '.join(sorted(unknown))}: lmms-eval has no such task; give names of its `--tasks list`"
        )
    return manager


@exit_on_user_error
def main() -> None:
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    manager = tasks_of({cell["task"] for cell in job["cells"]}, include_path=job["include_path"])
    model, failed = Vzip(**job["arguments"]), False
    if job["template"]:
        processor = model.answerer.comparison.processor
        processor.chat_template = chat_template(Template(**job["template"]), processor.tokenizer)
    for number, cell in enumerate(job["cells"], start=1):
        if model.rank == 0:
            print(f"[{number}/{len(job['cells'])}] {cell['name']}, {cell['task']}", flush=True)
        try:
            run_cell(model, cell, manager, limit=job["limit"])
        except Exception:  # a task's code is anybody's
            if model.world_size > 1:  # the other processes wait for this one
                path.with_name(FAILED).write_text(str(number))
                raise
            traceback.print_exc()
            failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
