"""The drawn subset depends on seed and content alone."""

import json
import math
import random
import sys
import uuid
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.examples.subset import draw_subset
from data.examples.table import open_table
from tests.helpers.broken import good, messages
from tests.helpers.commands import start
from vzip import UserError


def entries(**counts):
    """Examples of text, so many of each source."""
    made = []
    for source, count in counts.items():
        for number in range(count):
            texts = messages(f"question {number}", "answer")
            made.append({"id": f"{source}-{number}", "source": source, "conversations": texts})
    return made


ENTRIES = entries(coco=40, gqa=25, text=7)


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """`draw(entries, **settings)`: the ids drawn, in order."""
    folder = tmp_path_factory.mktemp("tables")

    def ids_drawn(entries, **settings):
        path = folder / f"{uuid.uuid4()}.json"
        path.write_text(json.dumps(entries))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VZIP_DATA", str(folder))
            table = open_table(path)

        ids = table.column("id")
        drawn = draw_subset(table, **{"fraction": 1.0, "seed": 0, **settings})
        return [ids[position] for position in drawn.positions]

    return ids_drawn


def counts(ids):
    return dict(Counter(name.split("-")[0] for name in ids))


def test_the_order_of_the_data_does_not_matter_and_the_seed_does(draw):
    drawn = draw(ENTRIES, fraction=0.3)
    shuffled = list(ENTRIES)
    random.Random(1).shuffle(shuffled)

    assert draw(shuffled, fraction=0.3) == drawn
    assert draw([*ENTRIES[::-1], {"id": "coco-99", "source": "coco"}], fraction=0.3) == drawn  # a bad one
    assert set(draw(ENTRIES, fraction=0.3, seed=1)) != set(drawn)


def test_each_source_gives_its_fraction_rounded_up(draw):
    drawn = draw(ENTRIES, fraction=0.25)
    assert counts(drawn) == {"coco": 10, "gqa": 7, "text": 2}
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) < set(draw(ENTRIES, fraction=0.5))
    assert counts(draw(entries(big=1000, tiny=1), fraction=0.01)) == {"big": 10, "tiny": 1}

    sources = [name.split("-")[0] for name in draw(ENTRIES)]
    assert len(sources) == len(ENTRIES)
    assert sources != sorted(sources)

    # The fraction is the number that was written: 0.07 * 100 is 7.000000000000001 in floating point.
    for fraction, count, expected in [(0.07, 100, 7), (0.55, 100, 55), (0.1, 30, 3), (0.1, 31, 4)]:
        assert len(draw(entries(coco=count), fraction=fraction)) == expected


@given(
    removed=st.integers(0, len(ENTRIES) - 1),
    fraction=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    seed=st.integers(0, 9),
)
def test_removing_an_example_moves_at_most_one_other_in(draw, removed, fraction, seed):
    before = draw(ENTRIES, fraction=fraction, seed=seed)
    after = draw(ENTRIES[:removed] + ENTRIES[removed + 1 :], fraction=fraction, seed=seed)
    assert len(set(after) - set(before)) <= 1
    assert len(set(before) - set(after)) <= 1

    # All others stay where they were, those of other sources among them.
    stayed = set(before) & set(after)
    assert [name for name in before if name in stayed] == [name for name in after if name in stayed]
    source = ENTRIES[removed]["source"]
    assert {name for name in after if not name.startswith(source)} == {
        name for name in before if not name.startswith(source)
    }


def test_sources_and_text_alone_can_be_left_out(draw):
    assert counts(draw(ENTRIES, sources=["gqa", "text"])) == {"gqa": 25, "text": 7}

    of_gqa = [name for name in draw(ENTRIES, fraction=0.3) if name.startswith("gqa")]
    assert draw(ENTRIES, sources=["gqa"], fraction=0.3) == of_gqa
    with pytest.raises(UserError, match=r"data\.sources.*no \['vg'\]; it has \['coco', 'gqa', 'text'\]"):
        draw(ENTRIES, sources=["gqa", "vg"])

    assert draw([*ENTRIES, good(1)], text_examples=False) == ["row-1"]
    with pytest.raises(UserError, match=r"no example can be drawn.* data\.text_examples=false leaves none"):
        draw(ENTRIES, text_examples=False)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, 10, math.nan])
def test_a_fraction_outside_of_0_to_1_is_refused(draw, fraction):
    with pytest.raises(UserError, match=r"data\.fraction"):
        draw(ENTRIES, fraction=fraction)


@pytest.mark.integration
def test_the_subset_is_the_same_in_another_process(tmp_path):
    """Hashes of texts differ between processes."""
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(entries(coco=30, gqa=30, ocr=30)))
    code = (
        "import sys\n"
        "from data.examples.subset import draw_subset\n"
        "from data.examples.table import open_table\n"
        "print(draw_subset(open_table(sys.argv[1]), fraction=0.3, seed=5).positions)\n"
    )
    done = start([sys.executable, "-c", code, str(path)], VZIP_DATA=str(tmp_path), PYTHONHASHSEED="12")
    positions = draw_subset(open_table(path), fraction=0.3, seed=5).positions
    assert json.loads(done.stdout) == positions
    assert len(positions) == 27
