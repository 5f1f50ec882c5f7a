"""Evaluate a run, an export or a base model with lmms-eval: the rows full, free and tuned over tasks, in one table.

make eval RUN=runs/X                                    python -m scripts.evaluate.main runs/X
make eval RUN=runs/X ARGS="--tasks gqa,pope --limit 100"
make eval RUN=llava-hf/llava-1.5-7b-hf ARGS="--budget 64 128"

Asked are held-out questions, which need no network (the run's own, else those of the embedded default), and, where the Hugging
Face hub answers, the paper's tasks. What is done is kept in RUN/eval, or in runs/eval/MODEL, and not asked again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from data.paths import write_json
from scripts.evaluate.environment import eval_python
from scripts.evaluate.questions import write_questions
from scripts.evaluate.table import print_scores, table_of
from scripts.evaluate.target import EvaluationSetting, subject_of
from scripts.evaluate.tasks import BY_NAME, FAILED, PAPER, TASK, published_rows
from train.cli import count, exit_on_user_error
from vzip import UserError

HUB_TIMEOUT_S = 5
VERSION = 2
"""Of how questions are asked: raise it when the same model would answer otherwise."""


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached; asked once, and not for long."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:  # an answer too
        return True
    except OSError:
        return False
    return True


def tasks_to_run(named: str | None, *, online: bool) -> tuple[list[str], list[str]]:
    """(names, why others are left out), beside the held-out questions.

    Args:
        named: names with commas; None for the paper's.
        online: whether the hub answers, which has the tasks' data; if it was turned off, named tasks are tried with the cache.

    Raises:
        UserError: a task asked for by name that needs the network, or a judge's key, without which it can't be run.
    """
    asked = [name.strip() for name in named.split(",")] if named else [task.name for task in PAPER]
    names = [name for name in asked if name not in ("", TASK)]
    if not names:
        return [], []
    cached = named is not None and constants.HF_HUB_OFFLINE
    if not cached and not online:
        if named:
            raise UserError(
                f"--tasks {','.join(names)}: the data is on the hub, and {constants.ENDPOINT} does not answer; connect, set "
                f"HF_HUB_OFFLINE=1 if it is in your cache, or leave --tasks out for the held-out questions alone"
            )
        return [], [
            f"{constants.ENDPOINT} does not answer: left out are {', '.join(task.column for task in PAPER)}"
        ]
    mute = {
        name: BY_NAME[name].key
        for name in names
        if name in BY_NAME and BY_NAME[name].key not in {None, *os.environ}
    }
    if mute and named:
        name, key = next(iter(mute.items()))
        raise UserError(
            f"--tasks {name}: its answers are judged by a service whose key is missing; set {key}, or leave it out"
        )
    return [name for name in names if name not in mute], [
        f"{name} is left out: it needs {key}" for name, key in mute.items()
    ]


def questions_to_ask(run: Path | None) -> tuple[Path | None, list[str]]:
    """(folder of the held-out questions, why they are left out)."""
    try:
        return write_questions(run), []
    except UserError as error:
        return None, [f"{TASK} is left out: {error}"]


def cells_of(
    rows: Sequence[EvaluationSetting],
    tasks: Sequence[str],
    *,
    questions: Path | None,
    folder: Path,
    stamp: dict[str, Any],
) -> list[dict[str, Any]]:
    """What the harness is to run, the held-out questions, where there are some, and the tasks, with the file of each.

    `stamp` is what an older file must have been made with.
    """
    local = {} if questions is None else {TASK: {"questions": questions.name}}
    cells = []
    for row in rows:
        for task in (*local, *tasks):
            own = {**stamp, "budget": row.budget} | local.get(task, {})
            path = folder / row.name / f"{task}.json"
            cell = {"name": row.name, "row": row.row, "budget": row.budget, "task": task}
            cells.append({**cell, "path": str(path), "stamp": own})
    return cells


def finished(cell: dict[str, Any]) -> dict[str, Any] | None:
    """What a cell's file says, if it was made with the same settings."""
    path = Path(cell["path"])
    found = json.loads(path.read_text()) if path.is_file() else None
    return found if found is not None and found.get("stamp") == cell["stamp"] else None


def harness_command(python: Path, *, processes: int) -> list[str]:
    """What starts the harness: several processes, which share a task's questions, through torch's launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [str(python), *(launcher if processes > 1 else []), "-m", "scripts.evaluate.harness"]


def run_harness(job: dict[str, Any], *, processes: int, online: bool) -> int:
    """Start lmms-eval in its own environment; its exit code.

    Of several processes, one that a task fails in takes the others with it: they are started again for the cells behind.
    """
    command, variables = harness_command(eval_python(), processes=processes), dict(os.environ)
    if not online:
        variables["HF_HUB_OFFLINE"] = "1"  # or everything that is looked for is asked for again and again
    if processes > 1 and not torch.cuda.is_available():
        variables["ACCELERATE_USE_CPU"] = "True"
    code, cells = 0, job["cells"]
    with tempfile.TemporaryDirectory() as scratch:
        path, failed = Path(scratch) / "job.json", Path(scratch) / FAILED
        while cells:
            path.write_text(json.dumps({**job, "cells": cells}))
            code = subprocess.run([*command, str(path)], env=variables, check=False).returncode or code
            cells = cells[int(failed.read_text()) :] if failed.is_file() else []
            failed.unlink(missing_ok=True)
    return code


def parse_eval_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a run folder, or the folder or hub id of an export or a base model")
    parser.add_argument("--budget", type=count, nargs="+", help="visual tokens of a base model's free rows")
    parser.add_argument(
        "--tasks", help="names of lmms-eval, with commas; by default the paper's; held-out questions always"
    )
    parser.add_argument("--limit", type=count, help="ask only the first questions of each task")
    parser.add_argument(
        "--batch-size", type=count, help="questions answered at a time; by default as after tuning"
    )
    parser.add_argument(
        "--processes", type=count, help="that share the questions; by default one a GPU, or one"
    )
    parser.add_argument("--device", help="of one process; by default a GPU, if there is one")
    parser.add_argument("--dtype", help="of the frozen weights; by default as in the run")
    parser.add_argument("--base", help="where a run's base model is now, if not where the run found it")
    parser.add_argument(
        "--out", type=Path, help="folder of the results, by default RUN/eval, or runs/eval/MODEL"
    )
    parser.add_argument("--fresh", action="store_true", help="ask everything again")
    return parser.parse_args()


def processes_of(arguments: argparse.Namespace) -> int:
    """How many ask. Raises UserError for several on a device that is named."""
    if arguments.device and arguments.processes:
        raise UserError(
            f"--device {arguments.device} and --processes {arguments.processes} contradict each other: each process has a "
            "device of its own; leave one of them out"
        )
    return arguments.processes or (1 if arguments.device else max(1, torch.cuda.device_count()))


@exit_on_user_error
def main() -> None:
    arguments = parse_eval_arguments()
    processes = processes_of(arguments)
    subject = subject_of(arguments)
    online = hub_answers()
    tasks, left_out = tasks_to_run(arguments.tasks, online=online)
    questions, unasked = questions_to_ask(subject.run)
    print("".join(f"{reason}\n" for reason in left_out + unasked), end="")
    if questions is None and not tasks:
        raise UserError("there is nothing left to ask, for the reasons above")
    stamp = {"version": VERSION, "model": subject.model, "limit": arguments.limit, "dtype": arguments.dtype}
    cells_of_tasks = partial(cells_of, subject.rows, questions=questions, folder=subject.folder, stamp=stamp)
    cells = cells_of_tasks(tasks)
    if arguments.fresh:
        for cell in cells:
            Path(cell["path"]).unlink(missing_ok=True)
    missing = [cell for cell in cells if finished(cell) is None]
    code = 0
    if missing:
        model = {"pretrained": arguments.source, "batch_size": subject.batch_size, "row": subject.rows[0].row}
        model |= {"budget": subject.rows[0].budget} if subject.rows[0].budget else {}
        model |= {name: value for name in ("device", "dtype", "base") if (value := getattr(arguments, name))}
        job = {
            "arguments": model,
            "limit": arguments.limit,
            "include_path": questions and str(questions),
            "cells": missing,
        }
        job |= {"template": subject.template}
        code = run_harness(job, processes=processes, online=online)
    earlier = sorted({path.stem for path in subject.folder.glob("*/*.json")} - {TASK, *tasks})
    done = [
        (cell, found) for cell in cells_of_tasks([*tasks, *earlier]) if (found := finished(cell)) is not None
    ]
    if done:
        table = table_of(done, published_rows(subject.names))
        write_json(
            subject.folder / "results.json", {"source": arguments.source, "limit": arguments.limit, **table}
        )
        part = f", the first {arguments.limit} questions of each task" if arguments.limit else ""
        print_scores(table, title=arguments.source + part)
    if code == 2:  # the harness has said what to change
        sys.exit(code)
    if lacking := [f"{cell['name']}: {cell['task']}" for cell in cells if finished(cell) is None]:
        raise UserError(
            f"not finished, for the reasons above: {', '.join(lacking)}\nThe same command asks only these again"
        )


if __name__ == "__main__":
    main()
