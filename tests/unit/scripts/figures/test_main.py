"""Figures that are drawn from runs and from models, or refused with a reason."""

import argparse
import json
from dataclasses import replace

import pytest
from PIL import Image

from scripts.figures import main as figures
from scripts.figures.charts import draw_attention_maps, draw_top_share
from scripts.figures.inputs import figure_inputs
from scripts.figures.score_charts import draw_recovery, draw_without_dominant
from scripts.figures.scores import comparable_scores
from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip.reducers.visionzip import VisionZip, split_budget

pytestmark = pytest.mark.slow


def inputs_of(source, tmp_path, **options):
    """The inputs that the command line describes, by default with one picture."""
    tiny.picture().save(tmp_path / "picture.png")
    arguments = {"pictures": [tmp_path / "picture.png"], "out": tmp_path / "out", "runs": [], "budgets": []}
    return figure_inputs(argparse.Namespace(source=str(source), **arguments | options))


def read(folder, name):
    """The numbers of a figure. Its picture must be more than an empty frame."""
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.width > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
    return json.loads((folder / f"{name}.json").read_text())


def texts_in(figure):
    """All texts that are written into the axes of a figure."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def point(series, tokens, score, seed=None):
    measured = {"run": "here", "metrics": {"open": score, "all": score}}
    return {"series": series, "num_visual_tokens": tokens, "seed": seed, **measured}


def test_one_budget_is_drawn_as_bars():
    numbers = {"kinds": ["open", "all"], "num_questions": 300}
    points = [point("full", 64, 0.99), point("free", 8, 0.65)]
    figure = draw_recovery(numbers | {"points": points})
    (axes,) = figure.axes
    assert [round(bar.get_height()) for bar in axes.patches] == [99, 65, 99, 65]
    assert texts_in(figure) == ["99", "65", "not tuned"] * 2
    assert figure.get_suptitle() == "Correct answers with 8 of 64 visual tokens"

    seeds = [point("tuned", 8, 0.92, 0), point("tuned", 8, 0.94, 1), point("random", 8, 0.5, 0)]
    figure = draw_recovery(numbers | {"points": points + seeds})
    assert texts_in(figure) == ["99", "65", "93", "50"] * 2

    # Several budgets are lines, with a panel for each kind of question.
    figure = draw_recovery(numbers | {"points": [*points, *seeds, point("free", 16, 0.8)]})
    assert [axes.get_title() for axes in figure.axes] == ["open", "all"]


def test_a_bar_that_was_not_measured_says_so():
    names = ("dominant and contextual", "no dominant", "no contextual")
    variants = [
        {"name": name, "dominant": 1, "contextual": 2, "free": {"all": 0.5}, "tuned": None} for name in names
    ]
    variants[0]["tuned"] = {"all": 0.75}
    figure = draw_without_dominant({"kinds": ["all"], "num_questions": 8, "variants": variants})
    assert texts_in(figure) == ["50", "75", "50", "not tuned", "50", "not tuned"]


@pytest.mark.parametrize(
    ("has_cls", "whose"),
    [(True, "attention from CLS to the patches"), (False, "attention that patches receive")],
)
def test_a_figure_says_whose_attention_it_shows(has_cls, whose):
    about = {"num_patches": 4, "num_layers": 1, "layer": 1, "has_cls": has_cls, "num_pictures": 1}
    pictures = {"pictures": [{"holding_half": 2, "most": 0.3}]}
    maps = draw_attention_maps(about | pictures, [(tiny.picture(), tiny.picture())])
    top = draw_top_share(about | {"lines": [{"top": 1, "uniform": 0.25, "shares": [0.3]}]})
    assert whose in maps.get_suptitle()
    assert whose in top.axes[0].get_ylabel()


def test_scores_are_drawn_from_runs_alone(runs, tmp_path, finished_run):
    finished_run(runs / "dominant", VisionZip(dominant=6, contextual=0), rows=("full", "free"))
    inputs = inputs_of(runs / "mine", tmp_path)
    for name in ("recovery", "without-dominant"):
        figures.write_figure(inputs, name)

    points = read(inputs.folder, "recovery")["points"]
    drawn = {(each["series"], each["num_visual_tokens"]) for each in points}
    assert drawn >= {("random", 6), ("tuned", 8), ("full", 16)}
    both, no_dominant, no_contextual = read(inputs.folder, "without-dominant")["variants"]
    assert both["tuned"]["all"] == pytest.approx((0.8 + 0.81) / 2)  # the mean over seeds
    scores = {"free": {"all": 0.5}, "tuned": {"all": 0.8}}
    assert no_dominant == {"name": "no dominant", "dominant": 0, "contextual": 6, **scores}
    assert (no_contextual["dominant"], no_contextual["free"]) == (6, {"all": 0.5})
    assert no_contextual["tuned"] is None


def test_a_run_with_another_split_than_the_papers_keeps_it_at_its_own_budget(tmp_path, finished_run):
    reducer = VisionZip(dominant=0, contextual=6)
    run = finished_run(tmp_path / "alone" / "mine", reducer, rows=("tuned",))  # evaluate.baselines=false
    inputs = inputs_of(run, tmp_path)
    for name in ("recovery", "kept-tokens"):
        figures.write_figure(inputs, name)

    points = read(inputs.folder, "recovery")["points"]
    assert [(each["series"], each["num_visual_tokens"]) for each in points] == [("tuned", 6)]
    budgets = read(inputs.folder, "kept-tokens")["budgets"]
    splits = {each["budget"]: (each["dominant"], each["contextual"]) for each in budgets}
    assert splits[6] == (0, 6)
    assert splits[12] == split_budget(12)


def test_recovery_without_a_score_is_refused(runs, tmp_path, monkeypatch):
    class Other:
        name = "other"

    score, *_ = comparable_scores(runs / "mine")
    monkeypatch.setattr(figures, "comparable_scores", lambda *_: [replace(score, reducer=Other())])
    inputs = inputs_of(runs / "mine", tmp_path)
    refused(figures.write_figure, inputs, "recovery", words=["has no score with VisionZip", "--budgets"])


def test_a_model_without_a_run_is_drawn_too(tmp_path, call):
    source = tiny.save_llava(tmp_path / "model", "onevision")
    pictures = [tmp_path / "wide.png", tmp_path / "square.png"]
    tiny.picture(1, 40, 90).save(pictures[0])
    tiny.picture(2).save(pictures[1])
    out = tmp_path / "out"
    options = ["--pictures", *pictures, "--budgets", 4, 9, "--out", out]
    printed = call(figures.main, source, *options)
    assert "recovery is left out" in printed and "only a finished run has" in printed

    maps = read(out, "attention-maps")
    assert not maps["has_cls"] and maps["layer"] == tiny.LAYERS - 1
    assert [len(picture["attention"]) for picture in maps["pictures"]] == [16, 16]
    assert [len(line["shares"]) for line in read(out, "top-share")["lines"]] == [tiny.LAYERS] * 4
    gradient = read(out, "softmax-gradient")
    assert gradient["num_rows"] == 2 * 4 * 16 and gradient["num_tokens"] == 16  # pictures, heads, tokens
    low, high = read(out, "kept-tokens")["budgets"]
    assert (low["budget"], high["budget"]) == (4, 9)
    assert 0 < low["attention"] < high["attention"] < 1
    assert sorted(path.suffix for path in out.iterdir()) == [".json"] * 4 + [".png"] * 4


def test_bad_input_is_refused_with_what_to_do(runs, tmp_path, tiny_folder, call):
    refused(inputs_of, tiny_folder, tmp_path, pictures=[], words=["not a run folder", "--pictures", "--out"])
    refused(inputs_of, tiny_folder, tmp_path, out=None, words=["--out"])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    refused(inputs_of, tiny_folder, tmp_path, pictures=[text], words=["text.png", "can't be opened"])
    (runs / "more" / "meta.json").unlink()
    refused(inputs_of, runs / "more", tmp_path, words=["has not finished"])

    inputs = inputs_of(tiny_folder, tmp_path, budgets=[99])
    refused(figures.write_figure, inputs, "recovery", words=["only a finished run"])
    refused(figures.write_figure, inputs, "kept-tokens", words=["reducer.budget=99", "larger than"])
    assert not inputs.folder.exists()  # nothing half-written
    inputs = inputs_of(tiny_folder, tmp_path, out=text / "x")
    words = ["--out=", "text.png/x", "can't be written"]
    refused(figures.write_figure, inputs, "attention-maps", words=words)

    words = ["--figures histogram", "attention-maps"]
    refused(call, figures.main, tiny_folder, "--figures", "histogram", words=words)
