"""Examples and files with mistakes, for property tests: whatever they hold, nothing else may be harmed."""

import copy
import io

from hypothesis import strategies as st

from tests.helpers import tiny


def messages(*texts):
    """Questions and answers in turn."""
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def encoded(kind="JPEG", mode="RGB", *, size=(20, 10), seed=0, **options):
    """Bytes of a noisy picture of a size (width, height)."""
    file = io.BytesIO()
    picture = tiny.picture(seed, size[1], size[0])
    picture = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
    picture.save(file, kind, **options)
    return file.getvalue()


def good(number=0):
    """An example with an image, as an entry of a data file."""
    talk = messages("<image>\nwhat?", "a cat")
    return {"id": f"row-{number}", "image": f"coco/{number}.jpg", "conversations": talk}


def good_video(number=0):
    """An example with a video."""
    talk = messages("<video>\nwhat?", "a cat")
    return {"id": f"row-{number}", "video": f"valley/{number}.mp4", "conversations": talk}


SURROGATE = "\ud800"
PLACEHOLDERS = ["<image>", "<image><image>\n", "<video>"]
TEXTS = st.sampled_from(["", " ", "a", "\0", SURROGATE, "e\u0301\u202e\U0001f600", "\ufeff", *PLACEHOLDERS])
PATHS = st.sampled_from(
    ["", ".", "./", "..", "/", "/a.jpg", "a/../b.jpg", "~", "a.jpg", "\0", SURROGATE, "ö/1.jpg", "C:\\a.jpg"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
JSON = st.recursive(
    SCALARS | PATHS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
)
KEYS = st.sampled_from(["id", "image", "video", "conversations", "source", "type", "extra"])
MISTAKES = st.sampled_from(["drop", "replace", "image", "video", "message", "value", "speaker", "repeat"])


@st.composite
def mutated(draw):
    """A good example after a few mistakes."""
    entry = copy.deepcopy(draw(st.sampled_from([good(), good_video()])))
    for _ in range(draw(st.integers(0, 3))):
        key = draw(KEYS)
        talk = entry.get("conversations")
        match draw(MISTAKES):
            case "drop":
                entry.pop(key, None)
            case "replace":
                entry[key] = draw(JSON)
            case "image" | "video" as kind:
                entry[kind] = draw(PATHS | st.lists(PATHS | SCALARS, max_size=3))
            case "message" if isinstance(talk, list) and talk:
                talk[draw(st.integers(0, len(talk) - 1))] = draw(JSON)
            case "value" if isinstance(talk, list) and talk and isinstance(talk[-1], dict):
                talk[-1]["value"] = draw(TEXTS | JSON)
            case "speaker" if isinstance(talk, list) and talk and isinstance(talk[0], dict):
                talk[0]["from"] = draw(TEXTS | JSON)
            case "repeat" if isinstance(talk, list):
                entry["conversations"] = talk * draw(st.integers(0, 3))
    return entry


@st.composite
def pictures(draw):
    """The bytes of a picture, whole, cut or changed in places, or of another file."""
    kind = draw(st.sampled_from(["PNG", "JPEG", "GIF"]))
    content = bytearray(encoded(kind, size=(9, 12), seed=draw(st.integers(0, 9))))
    match draw(st.sampled_from(["whole", "cut", "changed", "other"])):
        case "cut":
            del content[draw(st.integers(0, len(content) - 1)) :]
        case "changed":
            for _ in range(draw(st.integers(1, 4))):
                content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        case "other":
            content = bytearray(draw(st.sampled_from([b"", b"<html>", b"GIF89a", bytes(40)])))
    return bytes(content)
