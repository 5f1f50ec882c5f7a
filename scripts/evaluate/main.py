"""Evaluate a run, an export or a base model with lmms-eval, and print one table.

The settings full, training-free and tuned answer several tasks:

make eval RUN=runs/X                                    python -m scripts.evaluate.main runs/X
make eval RUN=runs/X ARGS="--tasks gqa,pope --limit 100"
make eval RUN=llava-hf/llava-1.5-7b-hf ARGS="--budget 64 128"

The first task is the run's own held-out questions, or those of the embedded default, which need no
network. The paper's tasks follow if the Hugging Face hub can be reached. Results stay in RUN/eval,
or in runs/eval/MODEL, and the same command does not ask again for them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from data.fetch.deadline import Deadline
from data.fetch.http import Client, NotFoundError, TransientError
from scripts.evaluate.cells import FAILED_FILE, Cell, Job, make_cells
from scripts.evaluate.environment import eval_python
from scripts.evaluate.questions import write_questions
from scripts.evaluate.table import FinishedCell, print_scores, table_of
from scripts.evaluate.target import Target, find_target
from scripts.evaluate.tasks import BY_NAME, HELD_OUT, PAPER, published_settings
from train.cli import count, exit_on_user_error
from vzip import UserError
from vzip.files import write_json

HUB_TIMEOUT_S = 5
VERSION = 2
"""Version of how questions are asked. Raise it when the same model would answer differently."""
USER_ERROR_CODE = 2
"""Exit code of a harness that has told the user what to change."""


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached. Sends one request, and does not wait long."""
    if constants.HF_HUB_OFFLINE:
        return False

    # Most error pages are an answer too: the hub is there.
    try:
        with Client().answer(constants.ENDPOINT, {}, Deadline(HUB_TIMEOUT_S)):
            return True
    except NotFoundError:
        return True
    except TransientError:
        return False


def _missing_keys(names: Sequence[str]) -> dict[str, str]:
    """Return the tasks whose judge needs a key that is not set, each with its variable's name."""
    missing = {}
    for name in names:
        key = BY_NAME[name].key if name in BY_NAME else None
        if key is not None and key not in os.environ:
            missing[name] = key

    return missing


def tasks_to_run(chosen: str | None, *, online: bool) -> tuple[list[str], list[str]]:
    """Decide which tasks of lmms-eval are run besides the held-out questions.

    Args:
        chosen: the user's names, separated by commas. None for the paper's tasks.
        online: whether the hub, which has the data of the tasks, can be reached. If the user has
            turned it off (HF_HUB_OFFLINE), chosen tasks are tried with the cache.

    Returns:
        (names, reasons): the tasks to run, and a sentence for each that is left out.

    Raises:
        UserError: a chosen task needs the network, or the key of a judge.
    """
    # The held-out questions are always asked, so their name is no choice.
    wanted = chosen.split(",") if chosen else [task.name for task in PAPER]
    names = [name.strip() for name in wanted if name.strip() not in ("", HELD_OUT)]

    # Without the hub there is no data, unless the user says that it is in the cache.
    may_be_cached = chosen is not None and constants.HF_HUB_OFFLINE
    if names and not online and not may_be_cached:
        if chosen:
            raise UserError(
                f"--tasks {','.join(names)}: the data is on the hub, and {constants.ENDPOINT} does not "
                "answer; connect, set HF_HUB_OFFLINE=1 if the data is in your cache, or leave --tasks out "
                "to ask the held-out questions alone"
            )
        # The paper's tasks were not asked for, so leave them out without an error.
        columns = ", ".join(task.column for task in PAPER)
        return [], [f"{constants.ENDPOINT} does not answer: left out are {columns}"]

    # A task that the user has chosen must run. The paper's tasks may be left out.
    missing_keys = _missing_keys(names)
    if missing_keys and chosen:
        name, key = next(iter(missing_keys.items()))
        raise UserError(
            f"--tasks {name}: a service judges its answers, and its key is missing; set {key}, "
            "or leave the task out"
        )

    reasons = [f"{name} is left out: it needs {key}" for name, key in missing_keys.items()]
    return [name for name in names if name not in missing_keys], reasons


def questions_to_ask(run: Path | None) -> tuple[Path | None, list[str]]:
    """Write the held-out questions. Return (their folder, why they are left out)."""
    # Without them the other tasks can still run.
    try:
        return write_questions(run), []
    except UserError as error:
        return None, [f"{HELD_OUT} is left out: {error}"]


def harness_command(python: Path, *, processes: int) -> list[str]:
    """Return the command that starts the harness.

    The harness runs in the same working directory as this command, so a relative path means the
    same to both. torch's launcher starts several processes, which share the questions of a task.
    """
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [str(python), *launcher, "-m", "scripts.evaluate.harness"]


def _harness_environment(*, processes: int, online: bool) -> dict[str, str]:
    """Return the environment variables of the harness."""
    variables = dict(os.environ)

    # Without this, libraries would ask the hub for each file, and wait for an answer each time.
    if not online:
        variables["HF_HUB_OFFLINE"] = "1"

    # Without this, accelerate would expect a GPU for each of several processes.
    if processes > 1 and not torch.cuda.is_available():
        variables["ACCELERATE_USE_CPU"] = "True"

    return variables


def run_harness(job: Job, *, processes: int, online: bool) -> int:
    """Start lmms-eval in its own environment, and return its exit code.

    If a task fails in one of several processes, all of them end. They are started again for the
    remaining cells.
    """
    command = harness_command(eval_python(), processes=processes)
    variables = _harness_environment(processes=processes, online=online)

    code = 0
    cells = job.cells
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.json"
        failed = Path(scratch) / FAILED_FILE
        while cells:
            replace(job, cells=cells).write(path)
            process = subprocess.run([*command, str(path)], env=variables, check=False)
            code = process.returncode or code

            # Continue behind the cell that failed. Without this file, the harness reached the end.
            cells = cells[int(failed.read_text()) :] if failed.is_file() else []
            failed.unlink(missing_ok=True)

    return code


def parse_eval_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="a run folder, or the folder or hub id of an export or a base model")

    # Options that say what is asked.
    add(
        "--budget",
        type=count,
        nargs="+",
        help="visual tokens of a base model's training-free settings",
    )
    add(
        "--tasks",
        help="names of lmms-eval's tasks, separated by commas (default: the paper's); "
        "held-out questions are always asked",
    )
    add("--limit", type=count, help="ask only the first questions of each task")
    add("--fresh", action="store_true", help="ask everything again")

    # Options that say how it is asked.
    add(
        "--batch-size",
        type=count,
        help="questions answered at a time (default: as many as after tuning)",
    )
    add(
        "--processes",
        type=count,
        help="processes that share the questions (default: one for each GPU, or one)",
    )
    add("--device", help="device of a single process (default: a GPU, if there is one)")
    add("--dtype", help="dtype of the frozen weights (default: as in the run)")
    add("--base", help="folder or hub id of a run's base model, if it has moved")
    add(
        "--out",
        type=Path,
        help="folder of the results (default: RUN/eval, or runs/eval/MODEL)",
    )
    return parser.parse_args()


def num_processes(arguments: argparse.Namespace) -> int:
    """Return how many processes ask questions.

    Raises UserError if both the device and the number of processes are given.
    """
    if arguments.device and arguments.processes:
        raise UserError(
            f"--device {arguments.device} and --processes {arguments.processes} contradict each other: "
            "each process has a device of its own; leave one of them out"
        )
    if arguments.processes:
        return int(arguments.processes)

    # By default each GPU gets a process.
    return 1 if arguments.device else max(1, torch.cuda.device_count())


def _cells(
    arguments: argparse.Namespace,
    target: Target,
    tasks: Sequence[str],
    questions: Path | None,
) -> list[Cell]:
    """List the cells of the table."""
    # A result is used again only if it has this stamp.
    stamp = {
        "version": VERSION,
        "model": target.model,
        "limit": arguments.limit,
        "dtype": arguments.dtype,
    }
    return make_cells(target.settings, tasks, questions=questions, folder=target.folder, stamp=stamp)


def _make_job(
    arguments: argparse.Namespace, target: Target, questions: Path | None, cells: list[Cell]
) -> Job:
    """Describe to the harness how to load the model, and which cells to run."""
    # The harness loads the model in this setting, and switches to the others.
    first = target.settings[0]
    model: dict[str, Any] = {
        "pretrained": arguments.source,
        "batch_size": target.batch_size,
        "row": first.row,
    }
    if first.budget:
        model["budget"] = first.budget

    # Without an option, the model's own default holds.
    for name in ("device", "dtype", "base"):
        value = getattr(arguments, name)
        if value:
            model[name] = value

    return Job(
        arguments=model,
        limit=arguments.limit,
        include_path=str(questions) if questions else None,
        template=target.template,
        cells=cells,
    )


def _finished(cells: Sequence[Cell]) -> list[FinishedCell]:
    """Return the cells that have a result, each with its result."""
    finished = []
    for cell in cells:
        result = cell.result()
        if result is not None:
            finished.append((cell, result))

    return finished


def _show_table(arguments: argparse.Namespace, target: Target, finished: Sequence[FinishedCell]) -> None:
    """Write the table to results.json, and print it."""
    # The file is written first, so that it exists even if nobody reads the output.
    table = table_of(finished, published_settings(target.names))
    about = {"source": arguments.source, "limit": arguments.limit}
    write_json(target.folder / "results.json", {**about, **table})

    title = arguments.source
    if arguments.limit:
        title += f", the first {arguments.limit} questions of each task"
    print_scores(table, title=title)


@exit_on_user_error
def main() -> None:
    """Run the tasks that have no result yet, then print the table of all results."""
    arguments = parse_eval_arguments()
    processes = num_processes(arguments)
    target = find_target(arguments)

    # Decide which tasks can run on this machine, and say which are left out.
    online = hub_answers()
    tasks, reasons = tasks_to_run(arguments.tasks, online=online)
    questions, more_reasons = questions_to_ask(target.run)
    for reason in [*reasons, *more_reasons]:
        print(reason)
    if questions is None and not tasks:
        raise UserError("there is nothing left to ask, for the reasons above")

    # List the cells, and delete older results if the user wants that.
    cells = _cells(arguments, target, tasks, questions)
    if arguments.fresh:
        for cell in cells:
            Path(cell.path).unlink(missing_ok=True)

    # Run the cells that have no result yet.
    code = 0
    missing = [cell for cell in cells if cell.result() is None]
    if missing:
        job = _make_job(arguments, target, questions, missing)
        code = run_harness(job, processes=processes, online=online)

    # Show all results, including those of tasks that an earlier command has run.
    earlier = {path.stem for path in target.folder.glob("*/*.json")} - {HELD_OUT, *tasks}
    finished = _finished(_cells(arguments, target, [*tasks, *sorted(earlier)], questions))
    if finished:
        _show_table(arguments, target, finished)

    # Fail if a result is missing. With this code, the harness has already said what to change.
    if code == USER_ERROR_CODE:
        sys.exit(code)
    unfinished = [f"{cell.name}: {cell.task}" for cell in cells if cell.result() is None]
    if unfinished:
        raise UserError(
            f"not finished, for the reasons above: {', '.join(unfinished)}\n"
            "Run the same command again: it asks only these"
        )


if __name__ == "__main__":
    main()
