"""lmms-eval itself, in its own environment, on a tiny run and its held-out questions."""

import json
import sys
import textwrap

import datasets
import pytest

from scripts.evaluate import main as evaluation
from scripts.evaluate.environment import eval_python
from scripts.evaluate.questions import write_questions
from scripts.evaluate.tasks import TASK
from tests.helpers import tiny
from tests.helpers.commands import start, tune
from vzip import UserError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def python():
    """lmms-eval's Python, which a package index is needed to make."""
    try:
        return eval_python()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory):
    """A finished run of two budgets, each with its answers to 8 questions."""
    runs = tmp_path_factory.mktemp("runs")
    tune([*overrides, "optim.max_steps=1", "reducer.budget=[6,9]", f"runs={runs}", "name=tiny"])
    return runs / "tiny"


@pytest.fixture(scope="module")
def evaluated(run, python):
    done = start([sys.executable, "-m", "scripts.evaluate.main", str(run)], HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


ROWS = ("full", "free-6", "free-9", "tuned-6", "tuned-9")


def test_lmms_eval_hears_the_answers_that_the_run_has_given(evaluated, run):
    for row in ROWS:
        found = json.loads((run / "eval" / row / f"{TASK}.json").read_text())
        given = json.loads((run / f"answers_{row}.json").read_text())
        assert [answer["answer"] for answer in found["answers"]] == [[answer["answer"]] for answer in given]
        assert [answer["expected"] for answer in found["answers"]] == [answer["expected"] for answer in given]
        assert found["num_questions"] == {TASK: 8}


def test_the_scores_are_those_of_the_run(evaluated, run):
    results = json.loads((run / "eval" / "results.json").read_text())
    own = {row["name"]: row for row in json.loads((run / "result.json").read_text())["rows"]}
    assert [row["name"] for row in results["rows"]] == list(ROWS)
    for row in results["rows"]:
        assert row["scores"] == pytest.approx(
            {f"held out: {kind}": 100 * score for kind, score in own[row["name"]]["metrics"].items()}
        )
        assert row["num_visual_tokens"] == own[row["name"]]["num_visual_tokens"]
    assert "left out are GQA" in evaluated
    assert (
        "|vzip_held_out|none" in evaluated and evaluated.count("held out") >= 3
    )  # lmms-eval's table, and ours


def command(monkeypatch, *arguments):
    """scripts/evaluate/main.py in this process; it must succeed."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(evaluation.constants, "HF_HUB_OFFLINE", True)
    evaluation.main()


def test_what_is_done_is_not_asked_again(evaluated, run, monkeypatch, capfd):
    command(monkeypatch, str(run))
    again = capfd.readouterr().out
    assert "[1/" in evaluated and "[1/" not in again  # the harness counts what it runs
    assert (
        again.split("full, ", 1)[1] == evaluated.split("full, ", 1)[1].split("full, ", 1)[1]
    )  # the same tables


def test_what_is_missing_is_asked_by_several_processes_with_the_same_answers(
    evaluated, run, monkeypatch, capfd
):
    path = run / "eval" / "tuned-9" / f"{TASK}.json"
    before, others = (
        json.loads(path.read_text()),
        {other: other.stat().st_mtime_ns for other in run.glob("eval/*/*.json")},
    )
    path.unlink()
    command(monkeypatch, str(run), "--processes", "2")
    assert "[1/1] tuned-9, vzip_held_out" in capfd.readouterr().out
    found = json.loads(path.read_text())
    assert (before["num_processes"], found["num_processes"]) == (1, 2)
    assert found["answers"] == before["answers"] and found["results"] == before["results"]
    assert [other for other, time in others.items() if other.stat().st_mtime_ns != time] == [path]


SCRIPT = """
    import sys
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager, get_task_dict
    from lmms_eval.api.instance import Instance
    from lmms_eval.utils import load_yaml_config

    run, questions, stand_in = sys.argv[1:]
    arguments, more = f"pretrained={run},row=free,budget=9", {"batch_size": "2", "device": "cpu"}
    model = get_model("vzip").create_from_arg_string(arguments, more)
    assert not model.is_simple and model.batch_size == 2

    # A task of several rounds: each is made of the answers before it, until the task ends them.
    document, seen = {"n": 1}, []

    def messages(document, round_idx=None, previous_output=None, previous_round_info=None):
        asked = [{"role": "user", "content": [{"type": "text", "text": f"round {round_idx}"}]}]
        seen.append((round_idx, previous_output, previous_round_info))
        return asked if round_idx is None else (asked, round_idx == 3, previous_output, f"info {round_idx}")

    model.task_dict["rounds"] = {"test": [document]}
    asked = ("", messages, {"max_new_tokens": 2}, 0, "rounds", "test")
    request = Instance("generate_until_multi_round", asked, 0, {"task": "rounds", "doc_id": 0, "repeats": 1})
    (answers,) = model.generate_until_multi_round([request])
    assert len(answers) == 3 and [entry[0] for entry in seen] == [None, 1, 2, 3], seen
    assert [entry[1] for entry in seen[1:]] == [answers[:1], answers[:2], answers] and seen[2][2] == "info 1", seen

    # Requests that are not generated alike share no batch, and answers come back in the requests' order.
    (task,) = get_task_dict(["vzip_held_out"], TaskManager(include_path=questions, include_defaults=False), "chat").values()
    task.build_all_requests(limit=4, rank=0, world_size=1)
    model.task_dict["vzip_held_out"] = task.dataset
    requests = task.instances
    for number, request in enumerate(requests):
        request.args[2]["max_new_tokens"] = 1 + number % 2 * 7
    counts = [result.token_counts for result in model.generate_until(requests)]
    assert [count.output_tokens > 1 for count in counts] == [False, True, False, True], counts
    try:
        model.loglikelihood(requests)
    except NotImplementedError as error:
        assert "output_type generate_until" in str(error)

    # The paper's tasks are lmms-eval's, and measure what the table shows.
    import openpyxl  # with which MMBench writes the answers for its server
    from scripts.evaluate.harness import run_cell, tasks_of
    from scripts.evaluate.tasks import PAPER
    manager = tasks_of({task.name for task in PAPER}, include_path=questions)
    for task in PAPER:
        config = load_yaml_config(manager.task_index[task.name]["yaml_path"], mode="full")
        assert set(task.metrics) <= {metric["metric"] for metric in config["metric_list"]}, config
        assert config["output_type"] == "generate_until", config
    cell = {"name": "free", "row": "free", "budget": 6, "task": "stand_in", "stamp": {}, "path": f"{stand_in}/free/task.json"}
    run_cell(model, cell, TaskManager(include_path=stand_in, include_defaults=False), limit=3)

    try:
        tasks_of({"gqa", "no_such_task"}, include_path=questions)
    except ValueError as error:
        assert str(error).startswith("--tasks no_such_task: lmms-eval has no such task"), error
        print("all right")
"""


def save_stand_in(folder, task):
    """TextVQA as lmms-eval has it, but for its data: 4 questions, with pictures of noise, and short answers."""
    rows = [
        {
            "question_id": number,
            "question": "which?",
            "answers": ["noise"] * 10,
            "image": tiny.picture(number),
        }
        for number in range(4)
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    files = {"data_files": {"validation": str(folder / "data.parquet")}}
    own = {"task": "stand_in", "include": str(task), "dataset_path": "parquet", "dataset_kwargs": files}
    (folder / "stand_in.yaml").write_text(json.dumps({**own, "generation_kwargs": {"max_new_tokens": 2}}))


def test_the_plugin_does_what_lmms_eval_expects(run, python, tmp_path):
    save_stand_in(
        tmp_path,
        next(python.parent.parent.glob("lib/*/site-packages/lmms_eval/tasks/textvqa/textvqa_val.yaml")),
    )
    command = [str(python), "-c", textwrap.dedent(SCRIPT), str(run), str(write_questions(run)), str(tmp_path)]
    done = start(command, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "all right" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "free" / "task.json").read_text())
    assert found["num_questions"] == {"stand_in": 3} and "exact_match,none" in found["results"]["stand_in"]
    assert found["num_visual_tokens"] == 6 and len(found["answers"]) == 3
    assert list((tmp_path / "free" / "submissions").glob("textvqa*.json"))  # for the task's own server
