"""The preflight finds what would spoil a run, and its lengths are those that the model gets."""

import json
import os
import re
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data.batches.collate import Collator
from data.conversations import BadExample
from data.fetch.media_index import Checked, MediaIndex, media_bytes
from data.preflight.files import check_files
from data.preflight.lengths import measure_lengths
from data.preflight.report import check_faults, preflight_report
from data.preflight.show import MAX_LEFT_OUT, MAX_PANELS, MAX_TURNS, draw_report, print_report
from tests.helpers import tiny
from tests.helpers.broken import encoded
from tests.helpers.conversations import conversation
from tests.helpers.examples import tokenize
from vzip import UserError
from vzip.families import family_of
from vzip.files import sha256_of, write_json
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.templates.encode import IGNORED, encode, vicuna

pytestmark = pytest.mark.slow

TOKENIZER, TEMPLATE = tiny.tokenizer(), vicuna("")
SIZES = {"coco/1.png": (tiny.SIDE, tiny.SIDE), "coco/2.png": (40, 90), "vg/3.png": (150, 60)}
CONVERSATIONS = [
    conversation("<image>\nwhat?", "a cat", name="0", image="coco/1.png"),
    conversation("hello", "hi", "and?", "so it goes, and goes", name="1"),
    conversation("<image><image>both?", "yes", "sure?", "no", name="2", image=["coco/2.png", "vg/3.png"]),
    conversation("<image>\nwhere?", "there", name="3", image="vg/3.png"),
    conversation("<image>\nagain?", "yes", name="4", image="vg/3.png"),
]
WITH_VIDEO = conversation("<video>\nwhat?", "a dog", name="5", video="clips/5")


@pytest.fixture
def folder(tmp_path):
    """The images and the video of the conversations above."""
    for number, (path, size) in enumerate(SIZES.items()):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        tiny.picture(number, *size).save(tmp_path / path)

    (tmp_path / "clips/5").mkdir(parents=True)
    for number, frame in enumerate(tiny.video(5, 4)):
        frame.save(tmp_path / f"clips/5/{number}.png")
    record(tmp_path, *SIZES, "clips/5")
    return tmp_path


def index_of(folder):
    return MediaIndex(folder / "checked.jsonl")


def record(folder, *paths):
    """Record pictures and videos as they are now, as preparing the data does."""
    for path in paths:
        file = folder / path
        digest = "" if file.is_dir() else sha256_of(file)[:16]
        index_of(folder).record(Checked(path, media_bytes(file), digest=digest))


def find_faults(conversations, folder, *, sizes=SIZES, **options):
    table = table_of(conversations, folder, sizes=sizes)
    return check_files(table, folder, index=index_of(folder), **options)


def family(kind="clip"):
    return family_of(tiny.llava(kind)).without_weights()


def table_of(conversations, folder, *, max_tokens=2048, sizes=SIZES):
    return tokenize(conversations, TEMPLATE, folder, max_tokens=max_tokens, sizes=sizes).table


def measure(conversations, folder, *, kind="clip", reducer=None, max_tokens=2048):
    table = table_of(conversations, folder, max_tokens=max_tokens)
    return measure_lengths(table, family(kind), reducer or Random(budget=4), num_frames=3)


def report_of(lengths, broken_files=(), left_out=(), *, max_tokens=2048, max_positions=2048):
    return preflight_report(
        lengths, broken_files, left_out, max_tokens=max_tokens, max_positions=max_positions
    )


# Lengths


@pytest.mark.parametrize("kind", ["clip", "next", "onevision", "video", "mini-gemini"])
@pytest.mark.parametrize("reducer", [Identity(), Random(budget=4)], ids=repr)
def test_lengths_are_what_the_model_gets(folder, kind, reducer):
    conversations = [*CONVERSATIONS, WITH_VIDEO] if kind in tiny.VIDEO else CONVERSATIONS
    lengths = measure(conversations, folder, kind=kind, reducer=reducer)

    examples = tokenize(conversations, TEMPLATE, folder, sizes=SIZES)
    collator = Collator(tiny.processor(kind), family(kind), reducer, kinds=examples.kinds, num_frames=3)
    batch = collator(list(examples))
    assert lengths.expanded.tolist() == batch.attention_mask.sum(dim=1).tolist()
    assert lengths.labels.tolist() == (batch.labels != IGNORED).sum(dim=1).tolist()
    assert lengths.visual.sum() == sum(batch.num_placeholders.values())

    if kind not in tiny.VIDEO:
        with pytest.raises(UserError, match="no videos"):
            measure([WITH_VIDEO], folder, kind=kind)


def test_the_turn_of_a_cut_is_found(folder):
    turns = [("one?", "first"), ("two?", "second"), ("three?", "third")]
    ids, labels = encode(TEMPLATE, TOKENIZER, turns)
    carries = [label != IGNORED for label in labels]
    answers = [at for at in range(1, len(ids)) if carries[at] and not carries[at - 1]]
    whole = conversation(*(text for turn in turns for text in turn))

    cuts = {
        answers[0] - 2: 1,  # in the first question
        answers[0] + 2: 1,  # in its answer
        answers[1] - 2: 2,
        answers[1] + 1: 2,
        len(ids) - 1: 3,
        len(ids): 0,
    }
    for max_tokens, turn in cuts.items():
        lengths = measure([whole], folder, max_tokens=max_tokens)
        assert lengths.cut_turns.tolist() == [turn]
        assert lengths.labels.tolist() == [sum(carries[:max_tokens])]

        summary = report_of(lengths, max_tokens=max_tokens)["all"]
        assert summary["cut"]["rows"] == (turn > 0)
        assert summary["cut"]["rows_by_turn"] == ({str(turn): 1} if turn else {})
        assert summary["cut"]["lost_labels"] == sum(carries[max_tokens:])
        assert summary["cut"]["lost_share"] == pytest.approx(sum(carries[max_tokens:]) / sum(carries))
        assert summary["without_labels"] == 1 - summary["rows"] == (sum(carries[:max_tokens]) == 0)


# The report


def test_the_report_counts_by_source(folder):
    left_out = [
        {"id": "x", "source": "vg", "reason": "missing"},
        {"id": "y", "source": "gone", "reason": "missing"},
    ]
    broken = [BadExample("0", "coco", "coco/1.png: missing")]
    report = report_of(measure(CONVERSATIONS, folder), broken, left_out)

    counts = {}
    for source, group in report["sources"].items():
        counts[source] = (group["rows"], group["media"], group["left_out"], group["broken_files"])
    assert counts == {"coco": (2, 3, 0, 1), "vg": (2, 2, 1, 0), "text": (1, 0, 0, 0), "gone": (0, 0, 1, 0)}
    assert report["all"]["rows"] == 5
    assert report["all"]["left_out"] == 2
    assert report["left_out"] == left_out
    assert report["all"]["broken_files"] == 1

    visual = report["sources"]["coco"]["tokens"]["visual"]
    assert visual == {"mean": 6.0, "p10": 4.4, "p50": 6.0, "p90": 7.6, "max": 8}
    expanded = []
    for source in CONVERSATIONS:
        ids, _ = encode(TEMPLATE, TOKENIZER, source.turns)
        expanded.append(len(ids) + 3 * len(source.images))
    assert report["all"]["tokens"]["expanded"]["mean"] == pytest.approx(np.mean(expanded))
    assert report["all"]["tokens"]["expanded"]["max"] == max(expanded)
    assert json.loads(json.dumps(report)) == report


def test_examples_that_are_too_long_are_faults_and_the_advice_helps(folder):
    lengths = measure(CONVERSATIONS, folder)
    longest = int(lengths.expanded.max())
    assert report_of(lengths, max_positions=longest)["faults"] == []

    report = report_of(lengths, max_positions=longest - 1)
    assert report["all"]["too_long"] == len(report["faults"]) == (lengths.expanded == longest).sum()
    message = rf"\d: {longest} tokens, more than {longest - 1}\n.*data.max_tokens="
    with pytest.raises(UserError, match=message) as error:
        check_faults(report, folder)

    advised = int(str(error.value).split("data.max_tokens=")[1].split()[0])
    shorter = measure(CONVERSATIONS, folder, max_tokens=advised)
    assert report_of(shorter, max_positions=longest - 1)["faults"] == []

    with pytest.raises(UserError, match=r"too long, set a smaller reducer\.budget"):
        check_faults(report_of(lengths, max_positions=2), folder)


# Files


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "not a file, but a folder, a pipe or a device": lambda path: (path.unlink(), os.mkfifo(path)),
    "an empty file": lambda path: path.write_bytes(b""),
    "cannot identify": lambda path: path.write_bytes(b"<html>"),
    "9 x 7 px, but 60 x 150 when": lambda path: path.write_bytes(encoded("PNG", size=(9, 7))),
    "": lambda path: path.write_bytes(path.read_bytes()[:-200]),
}
"""Damage to a picture by the reason that is reported. A picture that is cut off has a reason of PIL's."""


def test_good_files_have_no_fault_and_a_broken_video_has_one(folder):
    # The header holds the size before the rotation that EXIF asks for.
    Image.open(folder / "coco/2.png").rotate(90, expand=True).save(folder / "coco/2.png")
    record(folder, "coco/2.png")
    assert find_faults([*CONVERSATIONS, WITH_VIDEO], folder) == []

    for frame in (folder / "clips/5").iterdir():
        frame.unlink()
    (bad,) = find_faults([*CONVERSATIONS, WITH_VIDEO], folder)
    assert bad.id == "5" and "no frames" in bad.reason


@pytest.mark.parametrize("num_decoded", [0, 1000])
def test_a_picture_that_became_another_of_the_same_size_is_found(folder, num_decoded):
    path = folder / "vg/3.png"
    Image.new("RGB", (60, 150), "red").save(path, "BMP")
    record(folder, "vg/3.png")
    Image.new("RGB", (60, 150), "blue").save(path, "BMP")

    (fault,) = find_faults(CONVERSATIONS, folder, num_decoded=num_decoded)
    assert fault.reason == "vg/3.png: it has another content than when the data was prepared"


@pytest.mark.parametrize("reason", DAMAGES, ids=lambda reason: reason or "cut")
def test_a_broken_image_is_reported_once_with_its_first_conversation(folder, reason):
    DAMAGES[reason](folder / "vg/3.png")
    (fault,) = find_faults(CONVERSATIONS, folder)
    assert (fault.id, fault.source) == ("2", "coco")
    assert fault.reason.startswith(f"vg/3.png: {reason}")

    # A header does not tell that the rest is missing. The recorded size does.
    (fault_of_header,) = find_faults(CONVERSATIONS, folder, num_decoded=0)
    assert reason or "another size" in fault_of_header.reason

    report = report_of(measure(CONVERSATIONS, folder), [fault])
    assert report["faults"] == [asdict(fault)]
    message = r"1 files.*0 examples.*coco: 1.*\n  2: vg/3.png.*\nPut the files back.*make data"
    with pytest.raises(UserError, match=message):
        check_faults(report, folder)


def test_the_sample_depends_on_the_seed_alone(folder):
    paths = [f"many/{number}.png" for number in range(40)]
    (folder / "many").mkdir()
    for path in paths:
        (folder / path).write_bytes(encoded("PNG", size=(tiny.SIDE, tiny.SIDE))[:-200])
    record(folder, *paths)
    conversations = [conversation("<image>", "a", name=path, image=path) for path in paths]
    sizes = dict.fromkeys(paths, (tiny.SIDE, tiny.SIDE))

    def sample(conversations, seed):
        faults = find_faults(conversations, folder, sizes=sizes, seed=seed, num_decoded=10)
        return {bad.id for bad in faults}

    assert len(sample(conversations, 0)) == 10
    assert sample(conversations, 0) == sample(conversations[::-1], 0) != sample(conversations, 1)


# What people see


def test_the_tables_show_every_source_the_cut_and_what_is_left_out(folder, capsys, monkeypatch):
    monkeypatch.setattr("data.preflight.show.Console", lambda: Console(width=160))
    texts = []
    for turn in range(MAX_TURNS + 2):
        texts += [f"question {turn}", f"answer {turn}"]
    cut = [conversation(*texts[: 2 * turn], "q" * 600, "a") for turn in range(1, MAX_TURNS + 2)]
    left_out = []
    for number in range(MAX_LEFT_OUT + 2):
        left_out.append({"id": f"[red]{number}", "source": "vg", "reason": "missing", "replaced": True})

    lengths = measure([*CONVERSATIONS, *cut], folder, max_tokens=600)
    print_report(report_of(lengths, [], left_out, max_tokens=600))
    shown = capsys.readouterr().out
    for source in ("coco", "vg", "text", "all"):
        assert len(re.findall(f"│ {source} +│", shown)) == 5
    turns = ", ".join(f"{turn} (1 examples)" for turn in range(2, MAX_TURNS + 2))
    assert f"data.max_tokens=600 falls in turn {turns}, others (1 examples)\n" in shown

    assert "  left out: [red]0 (vg): missing\n" in shown
    assert f"left out: [red]{MAX_LEFT_OUT - 1} (vg)" in shown and f"[red]{MAX_LEFT_OUT} " not in shown
    assert "  and 2 more, which check.json lists\n" in shown


def test_the_picture_shows_the_largest_sources(folder):
    numbers = range(1, MAX_PANELS + 3)
    conversations = [conversation("hello", "hi" * number, source=f"source {number}") for number in numbers]
    lengths = measure(conversations, folder)
    draw_report(lengths, report_of(lengths), folder / "check.png")

    with Image.open(folder / "check.png") as picture:
        assert picture.height < 1600  # as high as `MAX_PANELS` panels
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert {(0, 0x72, 0xB2), (0xE6, 0x9F, 0)} < colours


def test_conversations_without_a_label_are_counted_apart_and_alone_have_no_picture(folder):
    some = report_of(measure(CONVERSATIONS, folder, max_tokens=25), max_tokens=25)["all"]
    assert 0 < some["rows"] < len(CONVERSATIONS)
    assert some["without_labels"] == len(CONVERSATIONS) - some["rows"]
    assert some["tokens"]["labels"]["p10"] > 0

    lengths = measure(CONVERSATIONS[:1], folder, max_tokens=3)
    report = report_of(lengths, max_tokens=3)
    draw_report(lengths, report, folder / "check.png")
    print_report(report)
    write_json(folder / "check.json", report)
    assert report["all"]["rows"] == 0
    reason = "the cut at data.max_tokens=3 leaves no answer"
    assert report["left_out"] == [{"id": "0", "source": "coco", "reason": reason}]
    assert not (folder / "check.png").exists()
