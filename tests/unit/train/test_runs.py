"""Reading the folder of a run."""

import json

import pytest

from tests.helpers.errors import refused
from tests.helpers.runs import attached, save_run
from train.runs import FinishedRun, find_runs

SETTINGS = """\
model: {name: smol, template: {_target_: os.system}}
optim: {lr: 2.0e-05}
data: {path: '${oc.env:HOME}/x'}
"""

ANSWER = {
    "num_visual_tokens": 16,
    "image": "1.png",
    "question": "<image>a cat?",
    "expected": "yes",
    "answer": "Yes",
    "kind": "yesno",
    "correct": True,
}


@pytest.fixture
def folder(tmp_path):
    """A run that is still training: a kill has cut the last line of its metrics."""
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.yaml").write_text(SETTINGS)
    (run / "env.json").write_text('{"commit": "0123"}')
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    return run


def test_a_run_that_trains_has_settings_and_metrics(folder):
    run = FinishedRun(folder)
    assert run.name == "mine"
    assert run.has_settings and not run.is_finished
    assert run.env == {"commit": "0123"}
    assert run.metrics == [{"step": 0}, {"step": 1}]
    assert run.scores == []
    assert run.answers("full") is None
    refused(lambda: run.result, words=["has no result.json", "give a folder that a run wrote"])
    refused(lambda: run.meta, words=["has not finished"])


def test_settings_are_plain_data(folder):
    """Nothing is built or looked up that a run's settings name."""
    run = FinishedRun(folder)
    assert run.config["model"]["template"] == {"_target_": "os.system"}
    assert run.config["data"]["path"] == "${oc.env:HOME}/x"
    refused(lambda: run.settings, words=["config.yaml refers to ${oc.env:HOME}/x"])
    assert run.setting("optim.lr") == 2e-5
    assert run.setting("optim.momentum") is None
    assert run.setting("optim.lr.peak", 3) == 3


def test_a_finished_run_has_scores_and_answers(folder, tiny_folder):
    save_run(folder, attached(tiny_folder), tiny_folder)
    row = {"name": "full", "num_visual_tokens": 16, "num_questions": 1, "metrics": {"all": 1.0}}
    result = {"rows": [row], "seed": 0}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "answers_full.json").write_text(json.dumps([ANSWER]))
    run = FinishedRun(folder)
    assert run.is_finished
    assert run.result == result and run.scores == result["rows"]
    assert run.answers("full") == [ANSWER]
    assert run.meta["base"]["id"] == str(tiny_folder)
    assert [other.path for other in find_runs(folder.parent)] == [folder]


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("config.yaml", "data: {a: [", lambda run: run.config),
        ("config.yaml", "- 1", lambda run: run.config),
        ("config.yaml", "", lambda run: run.settings),
        ("env.json", "{", lambda run: run.env),
        ("env.json", "[]", lambda run: run.env),
        ("metrics.jsonl", "{\n", lambda run: run.metrics),
    ],
)
def test_a_damaged_file_is_named(folder, name, content, read):
    (folder / name).write_text(content)
    refused(read, FinishedRun(folder), words=[str(folder / name)])


def test_a_missing_file_is_named(tmp_path):
    run = FinishedRun(tmp_path)
    assert not run.has_settings
    assert run.setting("optim.lr", 1) == 1
    refused(lambda: run.config, words=[str(tmp_path), "has no config.yaml", "give a folder"])
