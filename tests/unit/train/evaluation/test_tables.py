"""The table of scores, and how much of the gap tuning closes."""

import pytest

from train.evaluation.tables import gap_closed, print_results


def row(name, value, num_visual_tokens=8):
    counts = {"num_visual_tokens": num_visual_tokens, "num_questions": 9}
    return {"name": name, **counts, "metrics": {"all": value}}


def rows_of(**values):
    return [row(name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        (rows_of(full=0.8, free=0.4, tuned=0.6), 0.5),
        (rows_of(full=0.8, free=0.4, tuned=0.9), 1.25),
        (rows_of(full=0.8, free=0.4, tuned=0.3), -0.25),
        (rows_of(full=0.4, free=0.4, tuned=0.6), None),
        (rows_of(full=0.3, free=0.4, tuned=0.6), None),
        (rows_of(full=0.8, tuned=0.6), None),
        ([], None),
    ],
)
def test_tuning_closes_a_share_of_the_gap(rows, share):
    assert gap_closed(rows, "all") == (None if share is None else pytest.approx(share))
    assert gap_closed(rows, "open") is None


def test_results_show_every_setting_and_what_each_budget_closes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    rows = [
        row("full", 0.8, 64),
        row("free-4", 0.2, 4),
        row("free-8", 0.4, 8),
        row("tuned-4", 0.5, 4),
        row("tuned-8", 0.7, 8),
    ]
    assert gap_closed(rows, "all", suffix="-4") == pytest.approx(0.5)
    assert gap_closed(rows, "all") is None

    print_results(rows, title="runs/elastic")
    shown = capsys.readouterr().out
    assert all(each["name"] in shown for each in rows)
    assert "all: tuning closes 50% of the gap between free-4 and full" in shown
    assert "all: tuning closes 75% of the gap between free-8 and full" in shown


def test_results_of_one_budget_and_of_no_questions(capsys):
    print_results(rows_of(full=0.8, free=0.4, tuned=0.6), title="runs/one")
    assert "all: tuning closes 50% of the gap between free and full\n" in capsys.readouterr().out
    print_results([], title="runs/one")
    assert "`make eval RUN=runs/one`" in capsys.readouterr().out
