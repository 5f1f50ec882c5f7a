"""Rows in LLaVA's form: good ones are read, bad ones give a reason."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings

from data.conversations import Conversation, parse_conversation
from tests.conftest import ROOT
from tests.helpers.broken import JSON, good, good_video, messages, mutated


def test_one_image_several_and_none():
    one = parse_conversation(
        {
            "id": "a",
            "image": "coco/1.jpg",
            "conversations": messages("<image>\nwhat?", "a cat", "sure?", "yes"),
        }
    )
    several = parse_conversation(
        {"image": ["vg/1.jpg", "gqa/2.jpg"], "conversations": messages("<image>", "x", "and <image>", "y")}
    )
    none = parse_conversation({"id": "c", "conversations": messages("hello", "hi")})

    assert one.images == ("coco/1.jpg",) and one.turns == (("<image>\nwhat?", "a cat"), ("sure?", "yes"))
    assert several.images == ("vg/1.jpg", "gqa/2.jpg") and several.id == ""
    assert none.images == () and none.turns == (("hello", "hi"),)


def test_one_video_several_and_both_kinds():
    one = parse_conversation(
        {"video": "valley/1.mp4", "conversations": messages("<video>\nwhat?", "a cat", "sure?", "yes")}
    )
    several = parse_conversation(
        {"video": ["a/1.mp4", "b/frames"], "conversations": messages("<video>", "x", "and <video>", "y")}
    )
    both = parse_conversation(
        {
            "image": ["coco/1.jpg", "coco/2.jpg"],
            "video": "a/1.mp4",
            "conversations": messages("<video><image><image>", "x"),
        }
    )

    assert (
        one.videos == ("valley/1.mp4",) and one.images == () and one.turns[0] == ("<video>\nwhat?", "a cat")
    )
    assert several.videos == ("a/1.mp4", "b/frames")
    assert both.images == ("coco/1.jpg", "coco/2.jpg") and both.videos == ("a/1.mp4",)
    assert parse_conversation(good()).videos == ()


@pytest.mark.parametrize(
    ("extra", "source", "kind"),
    [
        ({"video": "valley/train/1.mp4"}, "valley", "all"),
        ({"video": ["ssv2/1.webm"], "source": "mine"}, "mine", "all"),
        ({"video": "valley/1.mp4", "image": "coco/1.jpg"}, "coco", "all"),
        ({"image": "coco/train/1.jpg"}, "coco", "all"),
        ({"image": "coco/1.jpg", "source": "mine", "type": "yesno"}, "mine", "yesno"),
        ({"image": ["vg/1.jpg"]}, "vg", "all"),
        ({}, "text", "all"),
    ],
)
def test_source_and_kind(extra, source, kind):
    question = "".join(f"<{key}>" for key in ("image", "video") if key in extra) or "q"
    row = parse_conversation({"conversations": messages(question, "a"), **extra})
    assert (row.source, row.kind) == (source, kind)


def test_a_number_as_id_becomes_text():
    assert parse_conversation({**good(), "id": 7}).id == "7"


def test_digest_depends_on_content_not_on_the_order_of_keys():
    row = good()
    backwards = {key: row[key] for key in reversed(row)}
    backwards["conversations"] = [
        {key: message[key] for key in reversed(message)} for message in row["conversations"]
    ]

    assert (
        list(backwards) != list(row)
        and parse_conversation(backwards).digest == parse_conversation(row).digest
    )
    assert parse_conversation({**row, "id": "other"}).digest != parse_conversation(row).digest
    assert (
        parse_conversation({**row, "conversations": messages("<image>\nwhat?", "a dog")}).digest
        != parse_conversation(row).digest
    )


@pytest.mark.integration
def test_digest_is_the_same_in_another_process():
    row = {**good(), "id": "é \U0001f600"}
    code = "import json, sys; from data.conversations import parse_conversation; print(parse_conversation(json.loads(sys.argv[1])).digest)"
    command, env = [sys.executable, "-c", code, json.dumps(row)], os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [parse_conversation(row).digest]


def test_an_answer_before_the_first_question_is_skipped_as_llava_does():
    row = parse_conversation({"conversations": [{"from": "gpt", "value": "and so on"}, *messages("q", "a")]})
    assert row.turns == (("q", "a"),)


BROKEN = {
    "not an object": [good()],
    "no conversations": {"id": "x", "image": "a/b.jpg"},
    "empty conversations": {**good(), "conversations": []},
    "conversations is text": {**good(), "conversations": "what?"},
    "odd number of messages": {**good(), "conversations": messages("<image>", "a", "b")},
    "wrong speaker": {
        **good(),
        "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "<image>"}],
    },
    "an answer alone": {**good(), "conversations": [{"from": "gpt", "value": "a"}]},
    "two humans": {**good(), "conversations": [{"from": "human", "value": "<image>"}] * 2},
    "message is text": {**good(), "conversations": ["<image>", "a"]},
    "value is a number": {**good(), "conversations": messages("<image>", 3)},
    "no value": {**good(), "conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]},
    "image in an answer": {**good(), "conversations": messages("<image>", "a <image>")},
    "empty answer": {**good(), "conversations": messages("<image>", " \n")},
    "one placeholder too many": {**good(), "conversations": messages("<image><image>", "a")},
    "one placeholder too few": {**good(), "conversations": messages("what?", "a")},
    "placeholder without image": {"conversations": messages("<image>", "a")},
    "absolute path": {**good(), "image": "/etc/passwd"},
    "path upwards": {**good(), "image": "coco/../../secret.jpg"},
    "empty path": {**good(), "image": ""},
    "path is a number": {**good(), "image": 12},
    "paths are numbers": {**good(), "image": [12]},
    "path is an object": {**good(), "image": {"path": "a.jpg"}},
    "path that names no file": {**good(), "image": "."},
    "video in an answer": {**good_video(), "conversations": messages("<video>", "a <video>")},
    "video in an answer about an image": {**good(), "conversations": messages("<image>", "a <video>")},
    "a video too few": {**good_video(), "conversations": messages("<video><video>", "a")},
    "a video too many": {**good_video(), "conversations": messages("what?", "a")},
    "placeholder without video": {"conversations": messages("<video>", "a")},
    "a video for an image": {**good_video(), "conversations": messages("<image>", "a")},
    "both, but one placeholder": {**good_video(), "image": "a/b.jpg"},
    "absolute video": {**good_video(), "video": "/etc/passwd"},
    "video upwards": {**good_video(), "video": ["valley/../../secret.mp4"]},
    "empty video": {**good_video(), "video": ""},
    "video that names no file": {**good_video(), "video": "./"},
    "video is a number": {**good_video(), "video": 12},
    "videos are numbers": {**good_video(), "video": [12]},
    "video is an object": {**good_video(), "video": {"path": "a.mp4"}},
}


@pytest.mark.parametrize("row", BROKEN.values(), ids=BROKEN)
def test_a_malformed_row_gives_a_reason(row):
    with pytest.raises(ValueError) as error:
        parse_conversation(row)
    assert str(error.value)


def test_reasons_tell_the_faults_apart():
    reasons = set()
    for row in BROKEN.values():
        with pytest.raises(ValueError) as error:
            parse_conversation(row)
        reasons.add(str(error.value))
    assert len(reasons) >= 18


def test_a_reason_says_which_kind_is_wrong():
    for row, kind in ((BROKEN["absolute path"], "image"), (BROKEN["absolute video"], "video")):
        with pytest.raises(ValueError, match=kind):
            parse_conversation(row)
    with pytest.raises(ValueError, match="2 <video> in the questions, but 1 videos"):
        parse_conversation(BROKEN["a video too few"])


def test_text_that_is_half_a_character_is_bad():
    # JSON can hold half of a surrogate pair, but no tokenizer takes it and no file can be written with it.
    with pytest.raises(ValueError, match="surrogates"):
        parse_conversation({**good(1), "conversations": messages("<image>", "\ud83d")})


@settings(max_examples=200, deadline=None)
@given(entry=mutated() | JSON)
def test_whatever_an_entry_holds_it_is_a_row_or_gives_a_reason(entry):
    try:
        row = parse_conversation(entry)
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(row, Conversation) and row.turns and row.source
    assert len(row.images) == sum(question.count("<image>") for question, _ in row.turns)
    assert len(row.videos) == sum(question.count("<video>") for question, _ in row.turns)
    assert not any(path.startswith("/") or ".." in path.split("/") for path in row.images + row.videos)
    assert all(
        answer.strip() and "<image>" not in answer and "<video>" not in answer for _, answer in row.turns
    )
