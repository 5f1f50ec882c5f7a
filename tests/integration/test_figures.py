"""Figures and the efficiency report of a run, as their users start them."""

import json
import shutil
import sys

import pytest

from tests.helpers import tiny
from tests.helpers.commands import start, tune

pytestmark = pytest.mark.integration

FIGURES = ("attention-maps", "top-share", "softmax-gradient", "kept-tokens", "recovery", "without-dominant")


@pytest.fixture(scope="module")
def run(tmp_path_factory, overrides):
    """A finished run of one step, with 6 tokens."""
    folder = tmp_path_factory.mktemp("runs")
    tune([*overrides, "optim.max_steps=1", f"runs={folder}", "name=mine"])
    return folder / "mine"


def command(module, *arguments):
    """Run a command, and return what it printed."""
    done = start([sys.executable, "-m", module, *map(str, arguments)])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def read(path):
    return json.loads(path.read_text())


def test_all_figures_are_drawn_from_a_run(run, tmp_path):
    """The setting `free` is removed from its scores, so it is asked again: with the same answers."""
    copied = shutil.copytree(run, tmp_path / "copy")
    result = read(run / "result.json")
    scores = {row["name"]: row for row in result["rows"]}
    result["rows"] = [scores["full"], scores["tuned"]]
    (copied / "result.json").write_text(json.dumps(result))

    assert "left out" not in command("scripts.figures.main", copied, "--budgets", 6, 9)
    figures = copied / "figures"
    for name in FIGURES:
        assert (figures / f"{name}.png").is_file() and (figures / f"{name}.json").is_file()
    maps = read(figures / "attention-maps.json")
    assert maps["has_cls"]
    assert maps["num_pictures"] == 8  # those of the held-out questions

    names = {path.stem for path in figures.glob("answers_*.json")}
    assert names == {"answers_free-5-1", "answers_free-8-1", "answers_free-0-6", "answers_free-6-0"}
    assert read(figures / "answers_free-5-1.json") == read(run / "answers_free.json")
    counts = {answer["num_visual_tokens"] for answer in read(figures / "answers_free-8-1.json")}
    assert counts == {9}

    points = read(figures / "recovery.json")["points"]
    metrics = {(point["series"], point["num_visual_tokens"]): point["metrics"] for point in points}
    assert set(metrics) == {("full", 16), ("free", 6), ("tuned", 6), ("free", 9)}
    assert metrics["free", 6] == scores["free"]["metrics"]
    assert metrics["tuned", 6] == scores["tuned"]["metrics"]


def test_figures_of_a_run_are_drawn_from_photographs(run, tmp_path):
    pictures = [tmp_path / "one.jpg", tmp_path / "two.jpg"]
    for number, path in enumerate(pictures):
        tiny.picture(number, 150, 200).save(path)
    out = tmp_path / "out"
    arguments = ["--figures", "kept-tokens", "recovery", "--out", out, "--pictures", *pictures]
    printed = command("scripts.figures.main", run, *arguments)
    assert f"{out}/kept-tokens.png\n" in printed and f"{out}/recovery.png\n" in printed
    assert [budget["budget"] for budget in read(out / "kept-tokens.json")["budgets"]] == [3, 6, 12]


def test_the_efficiency_of_a_run_is_measured_on_its_questions(run):
    printed = command("scripts.efficiency.main", run, "--questions", 3, "--rounds", 1)
    assert "the run's held-out questions" in printed and "time to first token" in printed
    report = read(run / "efficiency.json")
    assert not report["made_up_questions"] and report["num_questions"] == 3
    assert [row["num_visual_tokens"] for row in report["rows"].values()] == [16, 6]
