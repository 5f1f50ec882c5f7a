"""Reading the folder of a run."""

import json

import pytest

from tests.helpers.errors import refused
from tests.helpers.runs import attached, held_out_answer, save_run
from train.runs import FinishedRun, find_runs

SETTINGS = """\
model: {name: smol, template: {_target_: os.system}}
optim: {lr: 2.0e-05}
data: {path: '${oc.env:HOME}/x'}
"""

ANSWER = held_out_answer("1.png", "<image>a cat?")
ROW = {"name": "full", "num_visual_tokens": 16, "num_questions": 1, "metrics": {"all": 1.0}}


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
    result = {"rows": [ROW], "seed": 0}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "answers_full.json").write_text(json.dumps([ANSWER]))
    run = FinishedRun(folder)
    assert run.is_finished
    assert run.result == result and run.scores == result["rows"]
    assert run.answers("full") == [ANSWER]
    assert run.meta["base"]["id"] == str(tiny_folder)
    assert [other.path for other in find_runs(folder.parent)] == [folder]


READERS = {
    "config.yaml": lambda run: run.config,
    "env.json": lambda run: run.env,
    "result.json": lambda run: run.scores,
    "metrics.jsonl": lambda run: run.metrics,
    "answers_full.json": lambda run: run.answers("full"),
}
DAMAGES = {
    "empty": b"",
    "binary": b"\xff\xfe\x00\x01\n",
    "NULs": bytes(100) + b"\n",
    "nested": b"[" * 100_000 + b"\n",
    "a list": b"[1]\n",
    "a number": b"7\n",
    "half": b'{"rows": [{"a": \n',
    "digits": b'{"step": ' + b"1" * 10_000 + b"}\n",
}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    # YAML has whole numbers without a limit, and any text is a value. Metrics begin empty.
    if (name, content) in (("config.yaml", DAMAGES["digits"]), ("metrics.jsonl", b"")):
        return
    refused(READERS[name], FinishedRun(folder), words=[str(folder / name)])


@pytest.mark.parametrize(
    ("name", "content", "entry"),
    [
        ("env.json", {"commit": 5}, "commit"),
        ("env.json", {"command": "train/tune.py"}, "command"),
        ("env.json", {"command": [1]}, "command"),
        ("env.json", {"hardware": {"world_size": "two"}}, "hardware.world_size"),
        ("result.json", {"rows": {}}, "rows"),
        ("result.json", {"rows": [1]}, "name"),
        ("result.json", {"rows": [ROW | {"metrics": {"all": "1"}}]}, "metrics"),
        ("result.json", {"rows": [ROW | {"metrics": {"open": 1.0}}]}, "metrics.all"),
        ("result.json", {"rows": [ROW, ROW | {"metrics": {"all": 1, "open": 1}}]}, "different kinds"),
        ("result.json", {"rows": [ROW | {"num_questions": 1.5}]}, "num_questions"),
        ("result.json", {"rows": [ROW], "seed": "0"}, "seed"),
        ("result.json", {"rows": [ROW], "manifest": 3}, "manifest"),
        ("metrics.jsonl", {"loss": 1.0}, "step"),
        ("metrics.jsonl", {"step": 1, "train/loss": "low"}, "line 1"),
        ("answers_full.json", [], "no answers"),
        ("answers_full.json", [ANSWER, {}], "answer 1"),
        ("answers_full.json", [ANSWER | {"image": None}], "image"),
    ],
)
def test_a_wrong_entry_is_named(folder, name, content, entry):
    (folder / name).write_text(json.dumps(content) + "\n")
    refused(READERS[name], FinishedRun(folder), words=[str(folder / name), entry])


def laughs(levels=9):
    """A few lines of YAML that stand for a billion values."""
    lines = ["l0: &l0 [ha]"]
    for level in range(1, levels + 1):
        references = ", ".join([f"*l{level - 1}"] * 10)
        lines.append(f"l{level}: &l{level} [{references}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text", [laughs(), "a: &a [*a]", "a: !!python/object/apply:os.system [ls]", "? [1]\n: 2", "data: {a: ["]
)
def test_yaml_that_no_run_writes_is_refused(folder, text):
    (folder / "config.yaml").write_text(text)
    refused(lambda: FinishedRun(folder).config, words=[str(folder / "config.yaml")])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("seed: many", "seed"),
        ("evaluate: {questions: all}", "evaluate.questions"),
        ("evaluate: 3", "EvaluateSettings"),
        ("data: [1]", "DataSettings"),
        ("data: {path: [1]}", "data.path"),
        ("engine: turbo", "engine"),
        ("when: 2026-01-01", "when"),
    ],
)
def test_a_setting_of_a_wrong_type_is_named(folder, text, name):
    (folder / "config.yaml").write_text(text)
    refused(lambda: FinishedRun(folder).settings, words=[str(folder / "config.yaml"), name])


def test_older_runs_have_the_defaults_of_settings_that_they_lack(folder):
    (folder / "config.yaml").write_text("{data: {held_out: q.json, gone: 1}, gone: 2}")
    settings = FinishedRun(folder).settings
    assert (settings.data.held_out, settings.data.gone, settings.gone) == ("q.json", 1, 2)
    assert settings.evaluate.questions == 300

    def read():
        with FinishedRun(folder).explained():
            return settings.data.image_folder

    refused(read, words=["config.yaml lacks a setting", "data.image_folder"])


def test_a_folder_to_write_into_lies_in_the_run(folder, tmp_path):
    run = FinishedRun(folder)
    assert run.own_folder("figures") == folder / "figures"
    (tmp_path / "home").mkdir()
    (folder / "figures").symlink_to(tmp_path / "home")
    refused(run.own_folder, "figures", words=["figures is a link out of the run's folder", "--out"])

    (folder / "eval").mkdir()
    (folder / "eval" / "full").symlink_to(tmp_path / "home")
    refused(run.own_folder, "eval", words=["full is a link out of the run's folder"])
    (folder / "eval" / "full").unlink()

    # A run that is itself a link is fine.
    (tmp_path / "link").symlink_to(folder)
    assert FinishedRun(tmp_path / "link").own_folder("eval") == tmp_path / "link" / "eval"


def test_a_missing_file_is_named(tmp_path):
    run = FinishedRun(tmp_path)
    assert not run.has_settings
    assert run.setting("optim.lr", 1) == 1
    refused(lambda: run.config, words=[str(tmp_path), "has no config.yaml", "give a folder"])
