"""Which runs can be compared, and their scores."""

from scripts.figures.scores import comparable_scores, same_but_budget, without_a_part
from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip.reducers.visionzip import VisionZip


def summary(scores):
    reduced = [score for score in scores if score.series != "full"]
    return sorted((score.series, score.num_visual_tokens, score.seed) for score in reduced)


def test_comparable_runs_give_each_score_once(runs):
    scores = comparable_scores(runs / "mine")
    usual = same_but_budget(scores, VisionZip(budget=6))
    assert len([score for score in usual if score.series == "full"]) == 1
    assert summary(usual) == [
        ("elastic", 4, 0),
        ("elastic", 6, 0),
        ("free", 4, None),
        ("free", 6, None),
        ("free", 8, None),
        ("random", 6, 0),
        ("tuned", 6, 0),
        ("tuned", 6, 1),
        ("tuned", 8, 0),
    ]
    without = without_a_part(VisionZip(budget=6))["no dominant"]
    own = [score for score in scores if score.reducer == without]
    assert summary(own) == [("free", 6, None), ("tuned", 6, 0)]

    # A run with another split than the paper's is compared as it is.
    beside = same_but_budget(comparable_scores(runs / "without"), without)
    assert ("tuned", 6, 0) in summary(score for score in beside if score.reducer == without)


def test_runs_that_measured_something_else_are_left_out_or_refused(runs, tmp_path, finished_run):
    num_scores = len(comparable_scores(runs / "mine"))
    reducer = VisionZip(budget=10)
    other_questions = finished_run(runs / "questions", reducer, evaluate={"questions": 9})
    other_base = finished_run(runs / "base", reducer, base=tiny.save_llava(tmp_path / "other", seed=3))
    unfinished = finished_run(runs / "unfinished", reducer)
    (unfinished / "result.json").unlink()
    assert len(comparable_scores(runs / "mine")) == num_scores

    # A run that was tuned in another way counts only if it is asked for: with its scores of free and tuned.
    faster = finished_run(runs / "faster", reducer, optim={"lr": 1.0})
    assert len(comparable_scores(runs / "mine")) == num_scores
    assert len(comparable_scores(runs / "mine", [faster])) == num_scores + 2

    for other in (other_questions, other_base):
        refused(comparable_scores, runs / "mine", [other], words=["--runs", other.name, "differ"])
    words = ["unfinished", "has not finished", "result.json"]
    refused(comparable_scores, runs / "mine", [unfinished], words=words)
    refused(comparable_scores, unfinished, words=["has not finished"])


def test_a_run_tuned_in_another_way_is_no_other_seed(runs, finished_run):
    known = summary(comparable_scores(runs / "mine"))
    changes = [
        {"batch": {"size": 64}},
        {"data": {"held_out": "q.json", "text_examples": False}},
        {"quantize": "nf4"},
        {"model": {"dtype": "x"}},
    ]
    for number, change in enumerate(changes):
        finished_run(runs / f"other{number}", VisionZip(budget=6), seed=2, **change)
        assert summary(comparable_scores(runs / "mine")) == known, change


def test_settings_without_an_effect_keep_runs_comparable(runs, finished_run):
    finished_run(runs / "seed2", VisionZip(budget=6), seed=2, batch={"size": 16, "tokens": None})
    changes = {
        "control": True,
        "batch": {"size": 16, "tokens": 256},
        "data": {"held_out": "q.json", "cache": False},
        "save_every": 9,
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    finished_run(runs / "seed3", VisionZip(budget=6), seed=3, **changes)
    assert ("tuned", 6, 3) in summary(comparable_scores(runs / "seed2"))


def test_a_run_that_can_not_be_read_is_left_out_or_refused(runs, capsys):
    broken = runs / "again"
    damages = [
        ("meta.json", '{"format": 99}'),
        ("result.json", '{"rows": ['),
        ("result.json", "[]"),
        ("config.yaml", "data: {a: ["),
        ("config.yaml", "- 1"),
    ]
    for name, content in damages:
        whole = (broken / name).read_text()
        (broken / name).write_text(content)
        scores = summary(comparable_scores(runs / "mine", [runs / "more"]))
        assert ("tuned", 6, 1) not in scores and ("tuned", 6, 0) in scores
        assert f"{broken} is left out: " in capsys.readouterr().out
        refused(comparable_scores, broken, words=[str(broken)])
        refused(comparable_scores, runs / "mine", [broken], words=[str(broken)])
        (broken / name).write_text(whole)
