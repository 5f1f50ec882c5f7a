"""Rows and files with mistakes, for property tests: whatever they hold, nothing else may be harmed."""

import copy
import io

from hypothesis import strategies as st

from tests.helpers import tiny


def messages(*texts):
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def good(number=0):
    return {
        "id": f"row-{number}",
        "image": f"coco/{number}.jpg",
        "conversations": messages("<image>\nwhat?", "a cat"),
    }


def good_video(number=0):
    return {
        "id": f"row-{number}",
        "video": f"valley/{number}.mp4",
        "conversations": messages("<video>\nwhat?", "a cat"),
    }


TEXTS = st.sampled_from(
    [
        "",
        " ",
        "<image>",
        "<image><image>\n",
        "<video>",
        "a",
        "\0",
        "\ud800",
        "e\u0301\u202e\U0001f600",
        "\ufeff",
    ]
)
PATHS = st.sampled_from(
    ["", ".", "./", "..", "/", "/a.jpg", "a/../b.jpg", "~", "a.jpg", "\0", "\ud800", "ö/1.jpg", "C:\\a.jpg"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
JSON = st.recursive(
    SCALARS | PATHS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2)
)
KEYS = st.sampled_from(["id", "image", "video", "conversations", "source", "type", "extra"])


@st.composite
def mutated(draw):
    """A good row after a few mistakes."""
    row = copy.deepcopy(draw(st.sampled_from([good(), good_video()])))
    for _ in range(draw(st.integers(0, 3))):
        key = draw(KEYS)
        talk = row.get("conversations")
        match draw(
            st.sampled_from(["drop", "replace", "image", "video", "message", "value", "speaker", "repeat"])
        ):
            case "drop":
                row.pop(key, None)
            case "replace":
                row[key] = draw(JSON)
            case "image" | "video" as kind:
                row[kind] = draw(PATHS | st.lists(PATHS | SCALARS, max_size=3))
            case "message" if isinstance(talk, list) and talk:
                talk[draw(st.integers(0, len(talk) - 1))] = draw(JSON)
            case "value" if isinstance(talk, list) and talk and isinstance(talk[-1], dict):
                talk[-1]["value"] = draw(TEXTS | JSON)
            case "speaker" if isinstance(talk, list) and talk and isinstance(talk[0], dict):
                talk[0]["from"] = draw(TEXTS | JSON)
            case "repeat" if isinstance(talk, list):
                row["conversations"] = talk * draw(st.integers(0, 3))
    return row


@st.composite
def pictures(draw):
    """The bytes of a picture, whole, cut, changed in places, or none at all."""
    file = io.BytesIO()
    tiny.picture(draw(st.integers(0, 9)), 12, 9).save(file, draw(st.sampled_from(["PNG", "JPEG", "GIF"])))
    content = bytearray(file.getvalue())
    match draw(st.sampled_from(["whole", "cut", "changed", "other"])):
        case "cut":
            del content[draw(st.integers(0, len(content) - 1)) :]
        case "changed":
            for _ in range(draw(st.integers(1, 4))):
                content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        case "other":
            content = bytearray(draw(st.sampled_from([b"", b"<html>", b"GIF89a", bytes(40)])))
    return bytes(content)
