"""The preflight finds what would spoil a run, and its lengths are those that the model gets."""

import io
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data.batches.collate import Collator
from data.conversations import BadExample, parse_conversation
from data.examples.tokens import Examples, write_tokens
from data.paths import write_json
from data.preflight.check import check_faults, check_files, measure_lengths, report
from data.preflight.show import MAX_PANELS, MAX_TURNS, draw_report, print_report
from tests.helpers import tiny
from vzip import UserError
from vzip.families import family_of
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.templates.encode import encode, vicuna

TOKENIZER, TEMPLATE = tiny.tokenizer(), vicuna("")
SIZES = {"coco/1.png": (tiny.SIDE, tiny.SIDE), "coco/2.png": (40, 90), "vg/3.png": (150, 60)}


def row(number, *turns, **media):
    messages = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(turns)]
    return parse_conversation({"id": f"row-{number}", "conversations": messages, **media})


ROWS = [
    row(0, "<image>\nwhat?", "a cat", image="coco/1.png"),
    row(1, "hello", "hi", "and?", "so it goes, and goes"),
    row(2, "<image><image>both?", "yes", "sure?", "no", image=["coco/2.png", "vg/3.png"]),
    row(3, "<image>\nwhere?", "there", image="vg/3.png"),
    row(4, "<image>\nagain?", "yes", image="vg/3.png"),
]
CLIP = row(5, "<video>\nwhat?", "a dog", video="clips/5")


@pytest.fixture
def folder(tmp_path):
    """The pictures of `ROWS` and the frames of `CLIP`."""
    for number, (path, size) in enumerate(SIZES.items()):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        tiny.picture(number, *size).save(tmp_path / path)
    (tmp_path / "clips/5").mkdir(parents=True)
    for number, frame in enumerate(tiny.video(5, 4)):
        frame.save(tmp_path / f"clips/5/{number}.png")
    return tmp_path


def examples_of(rows, folder, *, max_tokens=2048):
    target = folder / f"tokens-{max_tokens}.arrow"
    write_tokens(rows, TEMPLATE, TOKENIZER, target, max_tokens=max_tokens, sizes=SIZES)
    return Examples(target, folder)


def family(kind="clip"):
    return family_of(tiny.llava(kind)).without_weights()


def measured(rows, folder, *, kind="clip", reducer=None, **settings):
    return measure_lengths(
        examples_of(rows, folder, **settings).table, family(kind), reducer or Random(budget=4), num_frames=3
    )


def reported(lengths, files=(), left_out=(), *, max_tokens=2048, max_positions=2048):
    return report(lengths, files, left_out, max_tokens=max_tokens, max_positions=max_positions)


@pytest.mark.parametrize("kind", ["clip", "next", "onevision", "video", "mini-gemini"])
@pytest.mark.parametrize("reducer", [Identity(), Random(budget=4)], ids=repr)
def test_lengths_are_what_the_model_gets(folder, kind, reducer):
    rows = [*ROWS, CLIP] if kind in tiny.VIDEO else ROWS
    lengths = measured(rows, folder, kind=kind, reducer=reducer)
    examples = examples_of(rows, folder)
    collate = Collator(tiny.processor(kind), family(kind), reducer, kinds=examples.kinds, num_frames=3)
    batch = collate(list(examples))
    assert lengths.expanded.tolist() == batch.attention_mask.sum(dim=1).tolist()
    assert lengths.labels.tolist() == (batch.labels != -100).sum(dim=1).tolist()
    assert lengths.visual.sum() == sum(batch.num_placeholders.values())


def test_videos_are_refused_for_a_model_that_takes_none(folder):
    with pytest.raises(UserError, match="no videos"):
        measured([CLIP], folder)


def test_it_says_where_rows_are_cut(folder):
    talk = [("one?", "first"), ("two?", "second"), ("three?", "third")]
    ids, labels = encode(TEMPLATE, TOKENIZER, talk)
    carries = [label != -100 for label in labels]
    starts = [at for at in range(1, len(ids)) if carries[at] and not carries[at - 1]]
    whole = row(0, *(text for turn in talk for text in turn))
    for max_tokens, turn in [
        (starts[0] - 2, 1),  # in the first question
        (starts[0] + 2, 1),  # in its answer
        (starts[1] - 2, 2),
        (starts[1] + 1, 2),
        (len(ids) - 1, 3),
        (len(ids), 0),
    ]:
        lengths = measured([whole], folder, max_tokens=max_tokens)
        assert lengths.cut_turns.tolist() == [turn]
        assert lengths.labels.tolist() == [sum(carries[:max_tokens])]
        found = reported(lengths, max_tokens=max_tokens)["all"]
        assert found["cut"]["rows"] == (turn > 0)
        assert found["cut"]["rows_by_turn"] == ({str(turn): 1} if turn else {})
        assert found["cut"]["lost_labels"] == sum(carries[max_tokens:])
        assert found["cut"]["lost_share"] == pytest.approx(sum(carries[max_tokens:]) / sum(carries))
        assert found["without_labels"] == 1 - found["rows"] == (sum(carries[:max_tokens]) == 0)


def test_the_report_counts_by_source(folder):
    lengths = measured(ROWS, folder)
    left_out = [
        {"id": "x", "source": "vg", "reason": "missing"},
        {"id": "y", "source": "gone", "reason": "missing"},
    ]
    found = reported(lengths, [BadExample("row-0", "coco", "coco/1.png: missing")], left_out)
    assert {source: part["rows"] for source, part in found["sources"].items()} == {
        "coco": 2,
        "vg": 2,
        "text": 1,
        "gone": 0,
    }
    assert {source: part["media"] for source, part in found["sources"].items()} == {
        "coco": 3,
        "vg": 2,
        "text": 0,
        "gone": 0,
    }
    assert {source: part["left_out"] for source, part in found["sources"].items()} == {
        "coco": 0,
        "vg": 1,
        "text": 0,
        "gone": 1,
    }
    assert found["all"]["rows"] == 5 and found["all"]["left_out"] == 2 and found["all"]["broken_files"] == 1
    assert found["sources"]["coco"]["tokens"]["visual"] == {
        "mean": 6.0,
        "p10": 4.4,
        "p50": 6.0,
        "p90": 7.6,
        "max": 8,
    }
    expanded = [
        len(ids) - row.turns[0][0].count("<image>") * -3
        for row in ROWS
        for ids, _ in [encode(TEMPLATE, TOKENIZER, row.turns)]
    ]
    assert found["all"]["tokens"]["expanded"]["mean"] == pytest.approx(np.mean(expanded))
    assert found["all"]["tokens"]["expanded"]["max"] == max(expanded)
    assert json.loads(json.dumps(found)) == found


def test_rows_without_a_label_are_told_apart(folder):
    lengths = measured(ROWS, folder, max_tokens=25)
    with_labels = len(examples_of(ROWS, folder, max_tokens=25))
    found = reported(lengths, max_tokens=25)
    assert 0 < with_labels < len(ROWS)
    assert found["all"]["rows"] == with_labels and found["all"]["without_labels"] == len(ROWS) - with_labels
    assert found["all"]["tokens"]["labels"]["p10"] > 0


def test_rows_that_the_model_can_not_take_are_faults_and_the_advice_helps(folder):
    lengths = measured(ROWS, folder)
    longest = int(lengths.expanded.max())
    assert reported(lengths, max_positions=longest)["faults"] == []

    found = reported(lengths, max_positions=longest - 1)
    assert found["all"]["too_long"] == len(found["faults"]) == (lengths.expanded == longest).sum()
    with pytest.raises(
        UserError, match=rf"row-\d: {longest} tokens, more than {longest - 1}\n.*data.max_tokens="
    ) as caught:
        check_faults(found, folder)
    room = int(str(caught.value).split("data.max_tokens=")[1].split()[0])
    assert reported(measured(ROWS, folder, max_tokens=room), max_positions=longest - 1)["faults"] == []

    with pytest.raises(UserError, match=r"too long, set a smaller reducer\.budget"):
        check_faults(reported(lengths, max_positions=2), folder)


def test_good_files_have_no_fault(folder):
    Image.open(folder / "coco/2.png").rotate(90, expand=True).save(
        folder / "coco/2.png"
    )  # as a header has it beside EXIF
    assert check_files(examples_of([*ROWS, CLIP], folder).table, folder) == []


def spoil(path, how):
    content = path.read_bytes()
    picture = io.BytesIO()
    tiny.picture(0, 7, 9).save(picture, "PNG")
    path.write_bytes(
        {"empty": b"", "no picture": b"<html>", "another": picture.getvalue(), "cut": content[:-200]}[how]
    )


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "vg/3.png: missing"),
        ("empty", "vg/3.png: an empty file"),
        ("no picture", "vg/3.png: cannot identify"),
        ("another", "vg/3.png: 9 x 7 px, but 60 x 150 when"),
        ("cut", "vg/3.png: "),
    ],
)
def test_a_broken_picture_is_found_once_with_its_first_row(folder, how, reason):
    (folder / "vg/3.png").unlink() if how == "missing" else spoil(folder / "vg/3.png", how)
    table = examples_of(ROWS, folder).table
    (fault,) = check_files(table, folder)
    assert (fault.id, fault.source) == ("row-2", "coco") and fault.reason.startswith(reason)
    # A header does not tell that the rest is missing; the sample does.
    assert len(check_files(table, folder, num_decoded=0)) == (how != "cut")

    found = reported(measured(ROWS, folder), [fault])
    assert found["faults"] == [asdict(fault)]
    with pytest.raises(
        UserError, match=r"1 files.*0 rows.*coco: 1.*\n  row-2: vg/3.png.*\nPut the files back.*make data"
    ):
        check_faults(found, folder)


def test_the_sample_depends_on_the_seed_alone(folder):
    paths = [f"many/{number}.png" for number in range(40)]
    (folder / "many").mkdir()
    for path in paths:
        tiny.picture().save(folder / path)
        spoil(folder / path, "cut")
    rows = [row(number, "<image>", "a", image=path) for number, path in enumerate(paths)]

    def sampled(rows, seed):
        target = folder / "many.arrow"
        write_tokens(
            rows,
            TEMPLATE,
            TOKENIZER,
            target,
            max_tokens=99,
            sizes=dict.fromkeys(paths, (tiny.SIDE, tiny.SIDE)),
        )
        return {
            bad.id for bad in check_files(Examples(target, folder).table, folder, seed=seed, num_decoded=10)
        }

    assert len(sampled(rows, 0)) == 10
    assert sampled(rows, 0) == sampled(rows[::-1], 0) != sampled(rows, 1)


@pytest.mark.parametrize("fault", ["missing", "no frames"])
def test_a_broken_video_is_found(folder, fault):
    for frame in (folder / "clips/5").iterdir():
        frame.unlink()
    if fault == "missing":
        (folder / "clips/5").rmdir()
    (bad,) = check_files(examples_of([CLIP], folder).table, folder)
    assert bad.id == "row-5" and fault in bad.reason


def test_the_tables_show_every_source_and_the_cut(folder, capsys, monkeypatch):
    monkeypatch.setattr("data.preflight.show.Console", lambda: Console(width=160))
    talk = [text for turn in range(MAX_TURNS + 2) for text in (f"question {turn}", f"answer {turn}")]
    rows = [*ROWS, *(row(turn, *talk[: 2 * turn], "q" * 600, "a") for turn in range(1, MAX_TURNS + 2))]
    print_report(reported(measured(rows, folder, max_tokens=600), max_tokens=600))
    shown = capsys.readouterr().out
    assert all(len(re.findall(f"│ {source} +│", shown)) == 5 for source in ("coco", "vg", "text", "all"))
    named = ", ".join(f"{turn} (1 rows)" for turn in range(2, MAX_TURNS + 2))
    assert f"data.max_tokens=600 falls in turn {named}, others (1 rows)\n" in shown


def test_a_picture_is_drawn_of_the_largest_sources(folder):
    rows = [
        row(number, "hello", "hi" * number, source=f"source {number}") for number in range(1, MAX_PANELS + 3)
    ]
    lengths = measured(rows, folder)
    draw_report(lengths, reported(lengths), folder / "check.png")
    with Image.open(folder / "check.png") as picture:
        assert picture.height < 1600  # as high as `MAX_PANELS` panels, however many sources there are
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert {(0, 0x72, 0xB2), (0xE6, 0x9F, 0)} < colours


def test_a_subset_without_any_label_is_reported(folder):
    lengths = measured(ROWS[:1], folder, max_tokens=3)
    found = reported(lengths, max_tokens=3)
    draw_report(lengths, found, folder / "check.png")
    print_report(found)
    write_json(folder / "check.json", found)
    assert found["all"]["rows"] == 0 and not (folder / "check.png").exists()
