"""Figures and the efficiency report of a run, as their users start them."""

import json
import shutil
import sys

import pytest

from tests.helpers.commands import start, tune

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(tmp_path_factory, overrides):
    """A finished run of one step, of 6 tokens."""
    folder = tmp_path_factory.mktemp("runs")
    tune([*overrides, "optim.max_steps=1", f"runs={folder}", "name=mine"])
    return folder / "mine"


def test_all_figures_are_drawn_from_a_run(run, tmp_path):
    """In its result the row `free` is missing, so that it is asked again: with the run's own answers."""
    copied = shutil.copytree(run, tmp_path / "copy")
    result = json.loads((run / "result.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    (copied / "result.json").write_text(json.dumps(result | {"rows": [rows["full"], rows["tuned"]]}))
    done = start([sys.executable, "-m", "scripts.figures.main", str(copied), "--budgets", "6", "9"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out" not in done.stdout
    names = ("attention-maps", "top-share", "softmax-gradient", "kept-tokens", "recovery", "without-dominant")
    figures = copied / "figures"
    assert all((figures / f"{name}.{end}").is_file() for name in names for end in ("png", "json"))
    maps = json.loads((figures / "attention-maps.json").read_text())
    assert maps["has_cls"] and maps["num_pictures"] == 8  # those of the held-out questions

    asked = {
        path.stem.removeprefix("answers_"): json.loads(path.read_text())
        for path in figures.glob("answers_*.json")
    }
    assert set(asked) == {"free-5-1", "free-8-1", "free-0-6", "free-6-0"}
    assert asked["free-5-1"] == json.loads((run / "answers_free.json").read_text())
    assert {given["num_visual_tokens"] for given in asked["free-8-1"]} == {9}
    points = json.loads((figures / "recovery.json").read_text())["points"]
    found = {(point["series"], point["num_visual_tokens"]): point["metrics"] for point in points}
    assert set(found) == {("full", 16), ("free", 6), ("tuned", 6), ("free", 9)}
    assert all(found[name, 6] == rows[name]["metrics"] for name in ("free", "tuned"))


def test_the_efficiency_of_a_run_is_measured_on_its_questions(run):
    done = start([sys.executable, "-m", "scripts.efficiency.main", str(run), "--questions", "3", "--rounds", "1"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the run's held-out questions" in done.stdout and "time to first token" in done.stdout
    found = json.loads((run / "efficiency.json").read_text())
    assert not found["made_up_questions"] and found["num_questions"] == 3
    assert [row["num_visual_tokens"] for row in found["rows"].values()] == [16, 6]
