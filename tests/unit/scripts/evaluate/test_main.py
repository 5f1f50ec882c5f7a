"""The command that evaluates: which tasks are run, what is asked again, and how the harness is started."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from scripts.common.environment import STAMP_FILE
from scripts.evaluate import main as evaluation
from scripts.evaluate.cells import Cell, Job, make_cells
from scripts.evaluate.environment import eval_python
from scripts.evaluate.target import settings_of_run
from scripts.evaluate.tasks import HELD_OUT, PAPER
from tests.helpers.errors import refused
from tests.helpers.server import Server


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr(evaluation.constants, "HF_HUB_OFFLINE", False)


def test_the_hub_is_asked_once_and_not_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens here
    assert not evaluation.hub_answers()

    with Server(tmp_path) as server:
        monkeypatch.setattr(evaluation.constants, "ENDPOINT", server.url)
        assert evaluation.hub_answers()  # "404" is an answer too

    monkeypatch.setattr(evaluation, "HUB_TIMEOUT_S", 1)
    with Server(tmp_path, {"/": "header"}, trickle_s=0.1) as server:  # its header never ends
        monkeypatch.setattr(evaluation.constants, "ENDPOINT", server.url)
        assert not evaluation.hub_answers()
        monkeypatch.setattr(evaluation.constants, "HF_HUB_OFFLINE", True)
        assert not evaluation.hub_answers()


def test_tasks_that_need_the_network_are_left_out_without_one(monkeypatch):
    names, (reason,) = evaluation.tasks_to_run(None, online=False)
    assert names == []
    assert all(word in reason for word in ("does not answer", "GQA", "MMVet"))
    assert evaluation.tasks_to_run(HELD_OUT, online=False) == ([], [])
    words = ["--tasks gqa,pope: ", "does not answer; connect"]
    refused(evaluation.tasks_to_run, f"gqa, pope,{HELD_OUT}", online=False, words=words)

    # With HF_HUB_OFFLINE the user says that the data is in the cache.
    monkeypatch.setattr(evaluation.constants, "HF_HUB_OFFLINE", True)
    assert evaluation.tasks_to_run("gqa", online=False) == (["gqa"], [])


def test_tasks_with_a_judge_need_its_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    names, (reason,) = evaluation.tasks_to_run(None, online=True)
    assert names == [task.name for task in PAPER if task.key is None]
    assert "needs OPENAI_API_KEY" in reason
    refused(evaluation.tasks_to_run, "gqa,mmvet", online=True, words=["set OPENAI_API_KEY"])

    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    assert evaluation.tasks_to_run(None, online=True) == ([task.name for task in PAPER], [])


RESULT = {
    "row": "full",
    "num_visual_tokens": 16,
    "seconds": 1.5,
    "results": {"gqa": {"exact_match,none": 0.5}},
    "num_questions": {"gqa": 2},
    "table": "|gqa|",
    "prompt": "USER: ",
}
"""What the harness writes for a cell."""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"stamp": ',
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"stamp": {}}).encode(),
        json.dumps({"stamp": {}} | RESULT | {"results": {"gqa": [1]}}).encode(),
        json.dumps({"stamp": {}} | RESULT | {"seconds": "many"}).encode(),
    ],
    ids=["empty", "half", "binary", "nested", "no entries", "a list", "a text"],
)
def test_a_damaged_result_is_named(tmp_path, content):
    path = tmp_path / "gqa.json"
    path.write_bytes(content)
    cell = Cell("full", row="full", budget=None, task="gqa", path=str(path), stamp={})
    refused(cell.result, words=[str(path), "delete it"])


def test_a_result_counts_if_it_was_made_with_the_same_settings(run, tmp_path):
    settings = settings_of_run(run)

    def cells(limit=None, questions="abc"):
        stamp = {"limit": limit}
        return make_cells(settings, ["gqa"], questions=tmp_path / questions, folder=tmp_path, stamp=stamp)

    first, *others = cells()
    names = [(cell.name, cell.task) for cell in cells()]
    assert names[:3] == [("full", HELD_OUT), ("full", "gqa"), ("free", HELD_OUT)]
    assert first.result() is None

    Path(first.path).parent.mkdir()
    Path(first.path).write_text(json.dumps({"stamp": first.stamp} | RESULT))
    assert first.result()["row"] == "full"
    assert [cell.result() for cell in others] == [None] * len(others)
    assert cells(limit=3)[0].result() is None
    assert cells(questions="def")[0].result() is None

    # Without questions, only the tasks of lmms-eval are left.
    cells = make_cells(settings[:1], ["gqa"], questions=None, folder=tmp_path, stamp={})
    assert [cell.task for cell in cells] == ["gqa"]


def test_nothing_left_to_ask_is_refused(run, tmp_path, monkeypatch, call):
    monkeypatch.setenv("VZIP_DATA", str(tmp_path))  # the embedded default's questions are not here
    monkeypatch.setattr(evaluation, "hub_answers", lambda: False)
    refused(call, evaluation.main, run, words=["nothing left to ask"])


def test_each_of_several_processes_has_a_device_of_its_own():
    assert evaluation.num_processes(argparse.Namespace(device="cpu", processes=None)) == 1
    both = argparse.Namespace(device="cpu", processes=2)
    refused(evaluation.num_processes, both, words=["--device cpu and --processes 2 contradict"])


HARNESS = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
for number, cell in enumerate(json.loads(path.read_text())["cells"], start=1):
    with open(sys.argv[0] + ".asked", "a") as file:
        print(cell["name"], file=file)
    if cell["name"] == "bad":
        (path.parent / "failed").write_text(str(number))
        sys.exit(1)
"""


def test_if_a_task_fails_in_several_processes_the_others_are_still_asked(tmp_path, monkeypatch):
    harness = tmp_path / "harness.py"
    harness.write_text(HARNESS)
    command = [sys.executable, str(harness)]
    monkeypatch.setattr(evaluation, "eval_python", lambda: Path(sys.executable))
    monkeypatch.setattr(evaluation, "harness_command", lambda python, processes: command)

    names = ["good", "bad", "bad", "fine"]
    cells = [Cell(name, row="full", budget=None, task="gqa", path="", stamp={}) for name in names]
    job = Job(arguments={}, limit=None, include_path=None, template=None, cells=cells)
    assert evaluation.run_harness(job, processes=2, online=False) == 1
    assert (tmp_path / "harness.py.asked").read_text().split() == names


def test_a_job_reads_as_it_was_written(tmp_path):
    cell = Cell("tuned", row="tuned", budget=6, task="gqa", path="a.json", stamp={"limit": None})
    job = Job({"pretrained": "x"}, limit=3, include_path=None, template={"end": ""}, cells=[cell])
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_an_environment_that_pip_cannot_fill_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("no-such-package-at-all==1.0\n")
    folder = tmp_path / "environment"
    refused(eval_python, folder, requirements=requirements, words=["pip can't install lmms-eval"])
    assert not (folder / STAMP_FILE).exists()  # so the next command tries again

    # Nothing is written into the running environment, which may be read-only.
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "nowhere"))
    refused(eval_python, folder, requirements=requirements, words=["pip can't install lmms-eval"])

    # An environment that uv made has no pip.
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda name, *rest: None)
    words = ["installing lmms-eval needs pip", "-m ensurepip"]
    refused(eval_python, folder, requirements=requirements, words=words)
