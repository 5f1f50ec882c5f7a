"""lmms-eval itself, in its own environment, on a tiny run and its held-out questions."""

import json
import sys
import textwrap

import datasets
import pytest

from scripts.evaluate import main as evaluation
from scripts.evaluate.environment import eval_python
from scripts.evaluate.questions import write_questions
from scripts.evaluate.tasks import HELD_OUT
from tests.helpers import tiny
from tests.helpers.commands import start, tune
from vzip import UserError

pytestmark = pytest.mark.integration

SETTINGS = ("full", "free-6", "free-9", "tuned-6", "tuned-9")


@pytest.fixture(scope="module")
def python():
    """lmms-eval's Python. Making its environment needs a package index."""
    try:
        return eval_python()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory):
    """A finished run of two budgets, with its answers to 8 questions."""
    runs = tmp_path_factory.mktemp("runs")
    tune([*overrides, "optim.max_steps=1", "reducer.budget=[6,9]", f"runs={runs}", "name=tiny"])
    return runs / "tiny"


@pytest.fixture(scope="module")
def printed(run, python):
    """What the command prints that evaluates the run."""
    process = start([sys.executable, "-m", "scripts.evaluate.main", str(run)], HF_HUB_OFFLINE="1")
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


def read_json(path):
    return json.loads(path.read_text())


def test_lmms_eval_gets_the_answers_and_scores_of_the_run(printed, run):
    for setting in SETTINGS:
        result = read_json(run / "eval" / setting / f"{HELD_OUT}.json")
        answers = read_json(run / f"answers_{setting}.json")
        for ours, theirs in zip(answers, result["answers"], strict=True):
            assert theirs["answer"] == [ours["answer"]]
            assert theirs["expected"] == ours["expected"]
        assert result["num_questions"] == {HELD_OUT: 8}

    own_rows = {row["name"]: row for row in read_json(run / "result.json")["rows"]}
    rows = read_json(run / "eval" / "results.json")["rows"]
    assert [row["name"] for row in rows] == list(SETTINGS)
    for row in rows:
        own = own_rows[row["name"]]
        scores = {f"held out: {kind}": 100 * share for kind, share in own["metrics"].items()}
        assert row["scores"] == pytest.approx(scores)
        assert row["num_visual_tokens"] == own["num_visual_tokens"]

    assert "left out are GQA" in printed
    assert "|vzip_held_out|none" in printed  # lmms-eval's table
    assert printed.count("held out") >= 3  # ours


def evaluate(monkeypatch, *arguments):
    """Run scripts/evaluate/main.py in this process; it must succeed."""
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(evaluation.constants, "HF_HUB_OFFLINE", True)
    evaluation.main()


def test_finished_results_are_not_asked_again(printed, run, monkeypatch, capfd):
    evaluate(monkeypatch, str(run))
    again = capfd.readouterr().out
    assert "[1/" in printed  # the harness counts what it runs
    assert "[1/" not in again

    # The first "full, " of the first command is the harness' count. The tables follow, and are the same.
    tables = printed.split("full, ", 1)[1].split("full, ", 1)[1]
    assert again.split("full, ", 1)[1] == tables


def test_several_processes_ask_what_is_missing_and_get_the_same_answers(printed, run, monkeypatch, capfd):
    path = run / "eval" / "tuned-9" / f"{HELD_OUT}.json"
    before = read_json(path)
    others = {other: other.stat().st_mtime_ns for other in run.glob("eval/*/*.json") if other != path}
    path.unlink()

    evaluate(monkeypatch, str(run), "--processes", "2")
    assert "[1/1] tuned-9, vzip_held_out" in capfd.readouterr().out

    after = read_json(path)
    assert (before["num_processes"], after["num_processes"]) == (1, 2)
    assert after["answers"] == before["answers"]
    assert after["results"] == before["results"]
    assert {other: other.stat().st_mtime_ns for other in others} == others


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

    # In a task of several rounds, each round is made of the answers before it, until the task ends them.
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
    assert [entry[1] for entry in seen[1:]] == [answers[:1], answers[:2], answers], seen
    assert seen[2][2] == "info 1", seen

    # Requests with different settings share no batch, and answers come back in the order of the requests.
    manager = TaskManager(include_path=questions, include_defaults=False)
    (task,) = get_task_dict(["vzip_held_out"], manager, "chat").values()
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

    # lmms-eval has the paper's tasks, and they measure what the table shows.
    import openpyxl  # MMBench writes the answers for its server with it
    from scripts.evaluate.cells import Cell
    from scripts.evaluate.harness import load_tasks, run_cell
    from scripts.evaluate.tasks import PAPER
    manager = load_tasks({task.name for task in PAPER}, include_path=questions)
    for task in PAPER:
        config = load_yaml_config(manager.task_index[task.name]["yaml_path"], mode="full")
        assert set(task.metrics) <= {metric["metric"] for metric in config["metric_list"]}, config
        assert config["output_type"] == "generate_until", config
    cell = Cell("free", row="free", budget=6, task="stand_in", path=f"{stand_in}/free/task.json", stamp={})
    run_cell(model, cell, TaskManager(include_path=stand_in, include_defaults=False), limit=3)

    try:
        load_tasks({"gqa", "no_such_task"}, include_path=questions)
    except ValueError as error:
        assert str(error).startswith("--tasks no_such_task: lmms-eval has no such task"), error
        print("all right")
"""


def save_stand_in(folder, task):
    """Write a task that is lmms-eval's TextVQA with 4 questions about pictures of noise, and short
    answers.
    """
    rows = []
    for number in range(4):
        rows.append(
            {
                "question_id": number,
                "question": "which?",
                "answers": ["noise"] * 10,
                "image": tiny.picture(number),
            }
        )
    datasets.Dataset.from_list(rows).to_parquet(folder / "data.parquet")

    content = {
        "task": "stand_in",
        "include": str(task),
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "data.parquet")}},
        "generation_kwargs": {"max_new_tokens": 2},
    }
    (folder / "stand_in.yaml").write_text(json.dumps(content))


def test_the_plugin_does_what_lmms_eval_expects(run, python, tmp_path):
    packages = python.parent.parent.glob("lib/*/site-packages")
    textvqa = next(packages) / "lmms_eval" / "tasks" / "textvqa" / "textvqa_val.yaml"
    save_stand_in(tmp_path, textvqa)

    questions = write_questions(run)
    script = textwrap.dedent(SCRIPT)
    process = start([str(python), "-c", script, str(run), str(questions), str(tmp_path)], HF_HUB_OFFLINE="1")
    output = process.stdout[-3000:] + process.stderr[-3000:]
    assert process.returncode == 0 and "all right" in process.stdout, output

    result = read_json(tmp_path / "free" / "task.json")
    assert result["num_questions"] == {"stand_in": 3}
    assert "exact_match,none" in result["results"]["stand_in"]
    assert result["num_visual_tokens"] == 6
    assert len(result["answers"]) == 3
    assert list((tmp_path / "free" / "submissions").glob("textvqa*.json"))  # for the task's own server
