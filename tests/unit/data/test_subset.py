"""The drawn subset depends on seed and content alone."""

import json
import math
import os
import random
import subprocess
import sys
import uuid
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.examples.subset import draw_subset
from data.examples.table import open_table
from tests.conftest import ROOT
from vzip import UserError


def entry(number, source):
    turns = [{"from": "human", "value": f"question {number}"}, {"from": "gpt", "value": "answer"}]
    return {"id": f"{source}-{number}", "source": source, "conversations": turns}


def entries(**counts):
    return [entry(number, source) for source, count in counts.items() for number in range(count)]


ENTRIES = entries(coco=40, gqa=25, text=7)


@pytest.fixture(scope="module")
def drawn_of(tmp_path_factory):
    """The ids drawn of entries, in order, with settings."""
    folder = tmp_path_factory.mktemp("tables")

    def drawn(entries, **wanted):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VZIP_DATA", str(folder))
            path = folder / f"{uuid.uuid4()}.json"
            path.write_text(json.dumps(entries))
            table = open_table(path)
        ids = table.column("id")
        return [
            ids[position]
            for position in draw_subset(table, **{"fraction": 1.0, "seed": 0, **wanted}).positions
        ]

    return drawn


def counts(ids):
    return dict(Counter(name.split("-")[0] for name in ids))


def test_the_order_of_the_rows_does_not_matter(drawn_of):
    drawn = drawn_of(ENTRIES, fraction=0.3)
    shuffled = list(ENTRIES)
    random.Random(1).shuffle(shuffled)

    assert drawn_of(shuffled, fraction=0.3) == drawn
    assert drawn_of(ENTRIES[::-1], fraction=0.3) == drawn


def test_the_seed_draws(drawn_of):
    first, again, other = (drawn_of(ENTRIES, fraction=0.3, seed=seed) for seed in (0, 0, 1))
    assert first == again and set(first) != set(other)


def test_each_source_gives_its_fraction_rounded_up(drawn_of):
    drawn = drawn_of(ENTRIES, fraction=0.25)
    assert counts(drawn) == {"coco": 10, "gqa": 7, "text": 2}
    assert len(set(drawn)) == len(drawn)


def test_the_order_mixes_sources(drawn_of):
    sources = [name.split("-")[0] for name in drawn_of(ENTRIES)]
    assert len(sources) == len(ENTRIES) and sources != sorted(sources)


def test_a_source_of_one_row_is_never_lost(drawn_of):
    assert counts(drawn_of(entries(big=1000, tiny=1), fraction=0.01)) == {"big": 10, "tiny": 1}


@pytest.mark.parametrize(
    ("fraction", "count", "expected"), [(0.07, 100, 7), (0.55, 100, 55), (0.1, 30, 3), (0.1, 31, 4)]
)
def test_a_fraction_is_the_decimal_number_that_was_written(drawn_of, fraction, count, expected):
    # 0.07 * 100 is 7.000000000000001 in floating point.
    assert len(drawn_of(entries(coco=count), fraction=fraction)) == expected


def test_a_larger_fraction_holds_the_smaller_one(drawn_of):
    small, large = (set(drawn_of(ENTRIES, fraction=fraction)) for fraction in (0.2, 0.5))
    assert small < large


@settings(max_examples=30, deadline=None)
@given(
    removed=st.integers(0, len(ENTRIES) - 1),
    fraction=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    seed=st.integers(0, 9),
)
def test_removing_a_row_moves_at_most_one_other_in(drawn_of, removed, fraction, seed):
    before = drawn_of(ENTRIES, fraction=fraction, seed=seed)
    after = drawn_of(ENTRIES[:removed] + ENTRIES[removed + 1 :], fraction=fraction, seed=seed)
    source = ENTRIES[removed]["source"]

    assert len(set(after) - set(before)) <= 1
    assert len(set(before) - set(after)) <= 1
    assert [name for name in after if not name.startswith(source)] == [
        name for name in before if not name.startswith(source)
    ]
    stayed = set(before) & set(after)
    assert [name for name in before if name in stayed] == [name for name in after if name in stayed]


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, 10, math.nan])
def test_a_fraction_outside_of_0_to_1_is_refused_by_name(drawn_of, fraction):
    with pytest.raises(UserError, match=r"data\.fraction"):
        drawn_of(ENTRIES, fraction=fraction)


def test_sources_are_chosen_and_unknown_ones_refused(drawn_of):
    assert counts(drawn_of(ENTRIES, sources=["gqa", "text"])) == {"gqa": 25, "text": 7}
    assert drawn_of(ENTRIES, sources=["gqa"], fraction=0.3) == [
        name for name in drawn_of(ENTRIES, fraction=0.3) if name.startswith("gqa")
    ]
    with pytest.raises(UserError, match=r"data\.sources.*no \['vg'\]; it has \['coco', 'gqa', 'text'\]"):
        drawn_of(ENTRIES, sources=["gqa", "vg"])


def test_rows_of_text_alone_can_be_left_out(drawn_of):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    pictures = [
        {"id": f"coco-{number}", "image": f"coco/{number}.jpg", "conversations": turns} for number in range(9)
    ]
    assert counts(drawn_of(ENTRIES + pictures, text_examples=False)) == {"coco": 9}


def test_rows_with_a_fault_are_never_drawn(drawn_of):
    assert drawn_of([*entries(coco=3), {"id": "coco-9", "source": "coco"}]) == drawn_of(entries(coco=3))


@pytest.mark.integration
def test_the_subset_is_the_same_in_another_process(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(entries(coco=30, gqa=30, ocr=30)))
    code = (
        "import sys; from data.examples.subset import draw_subset; from data.examples.table import open_table\n"
        "print(draw_subset(open_table(sys.argv[1]), fraction=0.3, seed=5).positions)"
    )
    env = os.environ | {"VZIP_DATA": str(tmp_path / "vzip"), "PYTHONHASHSEED": "12"}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "mine"))
    here = draw_subset(open_table(path), fraction=0.3, seed=5).positions
    assert json.loads(done.stdout) == here and len(here) == 27
