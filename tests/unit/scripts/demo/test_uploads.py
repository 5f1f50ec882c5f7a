"""What a visitor may send."""

import os

import pytest

from scripts.demo.uploads import MAX_QUESTION, check_question, open_upload, uploaded_file
from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder of uploads with a picture in it, and a picture outside."""
    folder = tmp_path / "uploads"
    (folder / "a").mkdir(parents=True)
    tiny.picture().save(folder / "a" / "mine.png")
    tiny.picture().save(tmp_path / "secret.png")
    return folder


def test_an_uploaded_file_is_taken(folder):
    path = folder / "a" / "mine.png"
    assert uploaded_file({"path": str(path), "orig_name": "x"}, folder) == path.resolve()
    assert open_upload(path).size == tiny.picture().size


def test_no_other_path_is_taken(folder):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder.parent / "pipe.png")

    outside = [folder.parent / "secret.png", folder / ".." / "secret.png", folder.parent / "pipe.png"]
    inside = [folder / name for name in ("link.png", "circle", "device", "pipe.png", "a", "gone.png")]
    for path in [*outside, *inside, "/dev/stdin", "/dev/zero", "", "x\0y", "\ud800", "a" * 9_000]:
        refused(uploaded_file, {"path": str(path)}, folder, words=["uploaded to this page"])


@pytest.mark.parametrize("file", [None, "text", 3, [], {}, {"path": None}, {"path": {"path": "/x"}}])
def test_a_request_without_a_path_is_refused(file, folder):
    refused(uploaded_file, file, folder, words=["uploaded to this page"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture", ["not a picture that can be read"]),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ["not a picture that can be read"]),
        (b"P6 40 40 255\ncut", ["not a picture that can be read"]),
        (b"P6 8000 7000 255\n", ["8,000 x 7,000 px", "50,000,000"]),
        (b"P6 100000 100000 255\n", ["can't be shown"]),
        (b"P6 5000 1 255\n", ["5,000 x 1 px"]),
    ],
)
def test_an_upload_that_is_not_a_picture_or_is_a_bomb_is_refused(content, words, tmp_path):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    refused(open_upload, path, words=words)


def test_a_message_to_visitors_names_no_path(tmp_path):
    refused(open_upload, tmp_path / "gone.png", words=["no longer here"])
    for content in (b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"P6 100000 100000 255\n"):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError) as error:
            open_upload(tmp_path / "bad.png")
        assert str(tmp_path) not in str(error.value)


def test_questions_are_plain_text_of_some_length():
    assert check_question("  what is it?\n\tand <b>why</b>? 🙂 ") == "what is it?\n\tand <b>why</b>? 🙂"
    assert check_question("x" * MAX_QUESTION)

    for nothing in ("", " \n", None, 3, ["what?"], {"path": "/x"}):
        refused(check_question, nothing, words=["Type a question"])
    refused(check_question, "x" * (MAX_QUESTION + 1), words=["2,001 characters", "at most 2,000"])
    for character, name in (("\ud83d", "U+D83D"), ("\0", "U+0000"), ("\x1b", "U+001B"), ("\x9b", "U+009B")):
        refused(check_question, f"why {character}?", words=[name])
