"""Examples in LLaVA's form: good ones are parsed, bad ones give a reason."""

import pytest
from hypothesis import given

from data.conversations import Conversation, parse_conversation
from tests.helpers.broken import JSON, good, good_video, messages, mutated


def parse(*texts, **fields):
    return parse_conversation({"conversations": messages(*texts), **fields})


def test_images_and_videos_are_paths_one_for_each_placeholder():
    one = parse("<image>\nwhat?", "a cat", "sure?", "yes", id="a", image="./coco/1.jpg")
    assert one.images == ("coco/1.jpg",)
    assert one.videos == ()
    assert one.turns == (("<image>\nwhat?", "a cat"), ("sure?", "yes"))

    several = parse("<image>", "x", "and <image>", "y", image=["vg/1.jpg", "gqa/2.jpg"])
    assert several.images == ("vg/1.jpg", "gqa/2.jpg")
    assert several.id == ""

    videos = parse("<video>", "x", "and <video>", "y", video=["a/1.mp4", "b/frames"])
    assert videos.videos == ("a/1.mp4", "b/frames")
    assert videos.images == ()

    both = parse("<video><image><image>", "x", image=["coco/1.jpg", "coco/2.jpg"], video="a/1.mp4")
    assert both.media == {"image": ("coco/1.jpg", "coco/2.jpg"), "video": ("a/1.mp4",)}

    text = parse("hello", "hi", id=7)
    assert text.images == ()
    assert text.id == "7"


@pytest.mark.parametrize(
    ("fields", "source", "kind"),
    [
        ({"video": "valley/train/1.mp4"}, "valley", "all"),
        ({"video": ["ssv2/1.webm"], "source": "mine"}, "mine", "all"),
        ({"video": "valley/1.mp4", "image": "coco/1.jpg"}, "coco", "all"),
        ({"image": "coco/train/1.jpg"}, "coco", "all"),
        ({"image": "coco/1.jpg", "source": "mine", "type": "yesno"}, "mine", "yesno"),
        ({"image": "1.jpg"}, "files", "all"),
        ({}, "text", "all"),
    ],
)
def test_source_and_kind(fields, source, kind):
    placeholders = [f"<{key}>" for key in ("image", "video") if key in fields]
    example = parse("".join(placeholders) or "q", "a", **fields)
    assert (example.source, example.kind) == (source, kind)


def test_the_digest_depends_on_the_content_and_not_on_the_order_of_keys():
    entry = good()
    digest = parse_conversation(entry).digest
    turned = [dict(reversed(message.items())) for message in entry["conversations"]]
    backwards = dict(reversed((entry | {"conversations": turned}).items()))

    assert list(backwards) != list(entry)
    assert parse_conversation(backwards).digest == digest
    assert parse_conversation(entry | {"id": "other"}).digest != digest
    assert parse_conversation(entry | {"conversations": messages("<image>\nwhat?", "a dog")}).digest != digest


def test_answers_are_taken_as_llava_takes_them():
    behind_another = [{"from": "gpt", "value": "and so on"}, *messages("q", "a")]
    assert parse_conversation({"conversations": behind_another}).turns == (("q", "a"),)

    with_picture = parse("draw a cat", "here: <image>", image="1.jpg")
    assert with_picture.images == ("1.jpg",)
    assert with_picture.turns == (("draw a cat", "here: <image>"),)

    for empty in ("", " ", "\n"):
        assert parse("<image>", empty, "q", "b", image="1.jpg").turns == (("<image>", empty), ("q", "b"))


def test_a_picture_that_a_text_names_twice_is_one_as_in_llava():
    twice = parse("<image>\nwhat is <image>?", "a cat", image="1.jpg")
    assert twice.images == ("1.jpg",)
    assert twice.turns == (("<image>\nwhat is ?", "a cat"),)

    # A list has a picture for each placeholder, and keeps them.
    two = parse("<image><image>", "cats", image=["1.jpg", "2.jpg"])
    assert two.turns == (("<image><image>", "cats"),)

    with pytest.raises(ValueError, match="2 <image> in the conversation, but 0 images"):
        parse("<image><image>", "cats")


WITH_TALK = {
    "empty conversations": ([], "not a list of question-answer pairs"),
    "conversations is text": ("what?", "not a list of question-answer pairs"),
    "odd number of messages": (messages("<image>", "a", "b"), "not a list of question-answer pairs"),
    "an answer alone": ([{"from": "gpt", "value": "a"}], "not a list of question-answer pairs"),
    "wrong speaker": ([*messages("a", "b")[::-1], *messages("c")], "message 1 is not from 'gpt'"),
    "two humans": ([{"from": "human", "value": "<image>"}] * 2, "message 1 is not from 'gpt'"),
    "message is text": (["<image>", "a"], "message 0 is not from 'human'"),
    "value is a number": (messages("<image>", 3), "message 1 has no text"),
    "no value": ([{"from": "human"}, {"from": "gpt", "value": "a"}], "message 0 has no text"),
    "image in two texts": (messages("<image>", "a <image>"), "2 <image> in the conversation, but 1 images"),
    "video in an answer": (messages("<image>", "a <video>"), "1 <video> in the conversation, but 0 videos"),
    "a placeholder too few": (messages("what?", "a"), "0 <image> in the conversation, but 1 images"),
    "half a surrogate pair": (messages("<image>", "\ud83d"), "surrogates"),
}
WITH_PATH = {
    "absolute": ("/etc/passwd", "leaves the image folder"),
    "upwards": ("coco/../../secret.jpg", "leaves the image folder"),
    "empty": ("", "neither a path nor a list of paths"),
    "a number": (12, "neither a path nor a list of paths"),
    "numbers": ([12], "neither a path nor a list of paths"),
    "an object": ({"path": "a.jpg"}, "neither a path nor a list of paths"),
    "no file": ("./", "names no file"),
}


@pytest.mark.parametrize(("talk", "reason"), WITH_TALK.values(), ids=WITH_TALK)
def test_malformed_conversations_give_a_reason(talk, reason):
    with pytest.raises(ValueError, match=reason):
        parse_conversation(good() | {"conversations": talk})


@pytest.mark.parametrize(("path", "reason"), WITH_PATH.values(), ids=WITH_PATH)
def test_malformed_paths_give_a_reason_with_their_kind(path, reason):
    with pytest.raises(ValueError, match=f"image.* {reason}"):
        parse_conversation(good() | {"image": path})
    with pytest.raises(ValueError, match=f"video.* {reason}"):
        parse_conversation(good_video() | {"video": path})


def test_other_mistakes_give_a_reason():
    with pytest.raises(ValueError, match="not an object"):
        parse_conversation([good()])
    with pytest.raises(ValueError, match="not a list of question-answer pairs"):
        parse_conversation({"id": "x", "image": "a/b.jpg"})
    with pytest.raises(ValueError, match="2 <video> in the conversation, but 1 videos"):
        parse("<video><video>", "a", video="a/b.mp4")
    with pytest.raises(ValueError, match="1 <image> in the conversation, but 0 images"):
        parse("<image>", "a", video="a/b.mp4")


@given(entry=mutated() | JSON)
def test_any_entry_is_an_example_or_gives_a_reason(entry):
    try:
        example = parse_conversation(entry)
    except ValueError as error:
        assert str(error)
        return

    assert isinstance(example, Conversation)
    assert example.turns and example.source
    texts = "".join(question + answer for question, answer in example.turns)
    assert len(example.images) == texts.count("<image>")
    assert len(example.videos) == texts.count("<video>")
    for path in example.images + example.videos:
        assert not path.startswith("/") and ".." not in path.split("/")
