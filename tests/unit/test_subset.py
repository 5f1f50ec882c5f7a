"""The drawn subset depends on seed and content alone, and its manifest says what it is."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.conversations import BadRow, parse_row, read_rows
from data.subset import draw, manifest
from tests.conftest import ROOT
from vzip import UserError


def entry(number, source):
    turns = [{"from": "human", "value": f"question {number}"}, {"from": "gpt", "value": "answer"}]
    return {"id": f"{source}-{number}", "source": source, "conversations": turns}


def rows_of(**counts):
    return [parse_row(entry(number, source)) for source, count in counts.items() for number in range(count)]


ROWS = rows_of(coco=40, gqa=25, text=7)


def counts(rows):
    return manifest(rows, [], fraction=1.0, seed=0)["num_rows_by_source"]


def test_the_order_of_the_rows_does_not_matter():
    drawn = draw(ROWS, fraction=0.3, seed=0)
    shuffled = list(ROWS)
    random.Random(1).shuffle(shuffled)

    assert draw(shuffled, fraction=0.3, seed=0) == drawn
    assert draw(ROWS[::-1], fraction=0.3, seed=0) == drawn


def test_the_seed_draws():
    first, again, other = (draw(ROWS, fraction=0.3, seed=seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert {row.id for row in first} != {row.id for row in other}


def test_each_source_gives_its_fraction_rounded_up():
    drawn = draw(ROWS, fraction=0.25, seed=0)
    assert counts(drawn) == {"coco": 10, "gqa": 7, "text": 2}
    assert len(set(drawn)) == len(drawn)


def test_the_order_mixes_sources():
    sources = [row.source for row in draw(ROWS, fraction=1.0, seed=0)]
    assert len(sources) == len(ROWS) and sources != sorted(sources)


def test_a_source_of_one_row_is_never_lost():
    assert counts(draw(rows_of(big=1000, tiny=1), fraction=0.01, seed=0)) == {"big": 10, "tiny": 1}


@pytest.mark.parametrize(("fraction", "count", "expected"), [(0.07, 100, 7), (0.55, 100, 55), (0.1, 30, 3), (0.1, 31, 4)])
def test_a_fraction_is_the_decimal_number_that_was_written(fraction, count, expected):
    # 0.07 * 100 is 7.000000000000001 in floating point.
    assert len(draw(rows_of(coco=count), fraction=fraction, seed=0)) == expected


def test_a_larger_fraction_holds_the_smaller_one():
    small, large = (set(draw(ROWS, fraction=fraction, seed=0)) for fraction in (0.2, 0.5))
    assert small < large


@settings(max_examples=40, deadline=None)
@given(removed=st.integers(0, len(ROWS) - 1), fraction=st.sampled_from([0.1, 0.25, 0.5, 0.9]), seed=st.integers(0, 9))
def test_removing_a_row_moves_at_most_one_other_in(removed, fraction, seed):
    before = draw(ROWS, fraction=fraction, seed=seed)
    after = draw(ROWS[:removed] + ROWS[removed + 1 :], fraction=fraction, seed=seed)
    source = ROWS[removed].source

    assert len(set(after) - set(before)) <= 1
    assert len(set(before) - set(after)) <= 1
    assert [row for row in after if row.source != source] == [row for row in before if row.source != source]
    stayed = set(before) & set(after)
    assert [row for row in before if row in stayed] == [row for row in after if row in stayed]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, 10, math.nan])
def test_a_fraction_outside_of_0_to_1_is_refused_by_name(fraction):
    with pytest.raises(UserError, match=r"data\.fraction"):
        draw(ROWS, fraction=fraction, seed=0)


def test_the_whole_is_a_fraction():
    assert set(draw(ROWS, fraction=1, seed=0)) == set(ROWS)


def test_the_manifest_counts_and_names():
    bad = [BadRow(id="x", source="coco", reason="missing")]
    drawn = draw(ROWS, fraction=0.25, seed=3)
    record = manifest(drawn, bad, fraction=0.25, seed=3)

    assert record["num_rows"] == len(drawn) == len(record["ids"]) == sum(record["num_rows_by_source"].values())
    assert record["num_rows_by_source"] == {"coco": 10, "gqa": 7, "text": 2}
    assert record["ids"] == [row.id for row in drawn]
    assert record["bad_rows"] == [{"id": "x", "source": "coco", "reason": "missing"}]
    assert (record["fraction"], record["seed"]) == (0.25, 3)
    assert json.loads(json.dumps(record)) == record


def test_the_hash_is_of_the_content():
    record = manifest(ROWS, [], fraction=1.0, seed=0)
    changed = [parse_row({**entry(0, "coco"), "id": "renamed"}), *ROWS[1:]]

    assert manifest(ROWS[::-1], [], fraction=1.0, seed=0)["hash"] == record["hash"]
    assert manifest(changed, [], fraction=1.0, seed=0)["hash"] != record["hash"]
    assert manifest(ROWS[1:], [], fraction=1.0, seed=0)["hash"] != record["hash"]


@pytest.mark.integration
def test_the_subset_is_the_same_in_another_process(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([entry(number, source) for source in ("coco", "gqa", "ocr") for number in range(30)]))
    code = (
        "import json, sys; from data.conversations import read_rows; from data.subset import draw, manifest\n"
        "rows = draw(read_rows(sys.argv[1])[0], fraction=0.3, seed=5)\n"
        "print(json.dumps(manifest(rows, [], fraction=0.3, seed=5)))"
    )
    command, env = [sys.executable, "-c", code, str(path)], os.environ | {"PYTHONHASHSEED": "12"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)

    here = manifest(draw(read_rows(path)[0], fraction=0.3, seed=5), [], fraction=0.3, seed=5)
    assert json.loads(done.stdout) == here
