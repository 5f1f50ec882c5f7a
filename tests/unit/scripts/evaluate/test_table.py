"""The table of an evaluation, and the paper's scores in it."""

import pytest

from scripts.evaluate.cells import Cell
from scripts.evaluate.table import print_scores, table_of
from scripts.evaluate.tasks import HELD_OUT, published_settings, scores_of


def finished_cell(row, budget, num_tokens, **results):
    cell = Cell(row, row=row, budget=budget, task=next(iter(results)), path="", stamp={})
    result = {
        "num_visual_tokens": num_tokens,
        "seconds": 1.5,
        "results": results,
        "num_questions": dict.fromkeys(results, 10),
        "table": "a table",
        "prompt": "USER: QUESTION",
    }
    return cell, result


MME = {"mme_perception_score,none": 1500.0, "mme_cognition_score,none": 362.0}


@pytest.mark.parametrize(
    ("task", "metrics", "scores"),
    [
        ("gqa", {"alias": "gqa", "exact_match,none": 0.619, "exact_match_stderr,none": 0.1}, {"GQA": 61.9}),
        ("mme", MME | {"mme_cognition_score_stderr,none": "N/A"}, {"MME": 1862.0}),
        ("mmbench_en_dev_static", {"gpt_eval_score,none": 64.7, "submission,none": None}, {"MMB": 64.7}),
        (HELD_OUT, {"open,none": 0.5, "open_stderr_clt,none": 0.1}, {"held out: open": 50.0}),
        ("chartqa", {"relaxed,none": 0.25}, {"chartqa: relaxed": 0.25}),
        ("mme", {"mme_perception_score,none": 1500.0}, {}),
    ],
)
def test_scores_are_the_papers_columns(task, metrics, scores):
    assert scores_of({task: metrics}) == scores


def test_the_table_has_per_cent_of_full_and_the_papers_scores(capsys):
    cells = [
        finished_cell("full", None, 576, gqa={"exact_match,none": 0.60}),
        finished_cell("full", None, 576, pope={"pope_f1_score,none": 0.80}),
        finished_cell("free", 64, 64, gqa={"exact_match,none": 0.54}),
        finished_cell("free", 64, 64, pope={"pope_f1_score,none": 0.60}),
        finished_cell("tuned", 64, 64, gqa={"exact_match,none": 0.57}),
    ]
    table = table_of(cells, published_settings([None, "llava-7b"]))

    full, free, tuned = table["rows"]
    assert free["scores"] == pytest.approx({"GQA": 54.0, "POPE": 60.0})
    assert free["percent_of_full"] == pytest.approx({"GQA": 90.0, "POPE": 75.0})
    assert free["average_percent"] == pytest.approx(82.5)
    assert free["seconds"] == 3.0
    assert tuned["average_percent"] == pytest.approx(95.0)
    assert full["average_percent"] == 100.0

    # The paper's averages are taken over what was asked here.
    both = pytest.approx(100 * (55.1 / 61.9 + 77.0 / 85.9) / 2)
    gqa_alone = pytest.approx(100 * 57.0 / 61.9)
    paper = [(row["name"], row["scores"]["GQA"], row["average_percent"]) for row in table["paper"]]
    assert paper == [("full", 61.9, 100), ("free", 55.1, both), ("tuned", 57.0, gqa_alone)]

    print_scores(table, title="a model")
    printed = capsys.readouterr().out
    for text in ("a table", "54.0 (90%)", "55.1 (89%)", "prompt: 'USER: QUESTION'"):
        assert text in printed
    assert printed.count("paper") == 3


@pytest.mark.parametrize("name", ["llava-13b", "llava-hf/llava-1.5-13b-hf"])
def test_published_settings_are_found_by_recipe_and_by_id(name):
    full, *others = published_settings([name])
    assert full["scores"]["POPE"] == 85.9
    assert {row["num_visual_tokens"] for row in others} == {64, 128, 192}
    assert published_settings(["smol", "a/folder"]) == []


def test_published_averages_are_those_of_the_scores():
    """An average is the mean per cent of `full`, so a mistyped number would show."""
    for name in ("llava-7b", "video-llava-7b"):
        full, *others = published_settings([name])
        for row in others:
            shares = [100 * row["scores"][column] / score for column, score in full["scores"].items()]
            assert sum(shares) / len(shares) == pytest.approx(row["average"], abs=0.15)
