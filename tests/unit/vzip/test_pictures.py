"""Pictures of every make come out as upright RGB, and of those that can't be opened only so many may be."""

import io
import struct
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from data.conversations import BadExample
from data.examples.prepare import check_bad_share
from tests.helpers import tiny
from vzip import UserError
from vzip.pictures import open_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves():
    """20 x 10 px: red on the left, blue on the right."""
    picture = Image.new("RGB", (20, 10), RED)
    picture.paste(BLUE, (10, 0, 20, 10))
    return picture


def near(pixel, colour):
    return all(abs(a - b) < 60 for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [
        ("a.png", "PNG", "RGB"),
        ("a.png", "PNG", "RGBA"),
        ("palette.png", "PNG", "P"),
        ("a.gif", "GIF", "P"),
        ("a.jpg", "JPEG", "RGB"),
        ("cmyk.jpg", "JPEG", "CMYK"),
        ("really_a_gif.jpg", "GIF", "P"),
        ("really_a_png.jpg", "PNG", "RGB"),
        ("no_suffix", "PNG", "RGB"),
        ("a.webp", "WEBP", "RGB"),
    ],
)
def test_any_make_of_picture_becomes_rgb(tmp_path, name, kind, mode):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow was built without WebP")
    halves().convert(mode).save(tmp_path / name, kind)
    picture = open_picture(tmp_path / name)

    assert (picture.mode, picture.size) == ("RGB", (20, 10))
    assert near(picture.getpixel((2, 5)), RED) and near(picture.getpixel((17, 5)), BLUE)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_becomes_rgb(tmp_path, mode):
    Image.new("L", (8, 6), 255).convert(mode).save(tmp_path / "grey.png")
    picture = open_picture(tmp_path / "grey.png")
    assert (picture.mode, picture.size, picture.getpixel((3, 3))) == ("RGB", (8, 6), (255, 255, 255))


def test_grey_of_16_bits_keeps_its_shades(tmp_path):
    pixels = torch.arange(64, dtype=torch.int32).mul(1024).view(8, 8)
    Image.fromarray(pixels.numpy().astype("uint16")).save(tmp_path / "deep.png")
    picture = open_picture(tmp_path / "deep.png")

    assert picture.mode == "RGB"
    assert [picture.getpixel((column, 4))[0] for column in (0, 4, 7)] == pytest.approx([128, 144, 156], abs=2)


@pytest.mark.parametrize(
    ("orientation", "size", "red_at", "blue_at"),
    [
        (1, (20, 10), (2, 5), (17, 5)),
        (3, (20, 10), (17, 5), (2, 5)),
        (6, (10, 20), (5, 2), (5, 17)),
        (8, (10, 20), (5, 17), (5, 2)),
    ],
)
def test_a_camera_held_sideways_comes_out_upright(tmp_path, orientation, size, red_at, blue_at):
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves().save(tmp_path / "photo.jpg", exif=exif, quality=95)
    picture = open_picture(tmp_path / "photo.jpg")

    assert picture.size == size
    assert near(picture.getpixel(red_at), RED) and near(picture.getpixel(blue_at), BLUE)


def encoded(kind):
    buffer = io.BytesIO()
    tiny.picture(0, 32).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"just text\n",
        b"{}",
        encoded("PNG")[:60],
        encoded("PNG")[: len(encoded("PNG")) // 2],
        encoded("JPEG")[:400],
    ],
    ids=["zero bytes", "text", "json", "png header", "half a png", "half a jpeg"],
)
def test_what_is_no_whole_picture_raises(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        open_picture(tmp_path / "a.jpg")


def test_a_missing_file_a_folder_and_an_impossible_name_raise(tmp_path):
    for path in (tmp_path / "nowhere.png", tmp_path, tmp_path / "a\0b.png"):
        with pytest.raises((OSError, ValueError)):
            open_picture(path)


def test_a_decompression_bomb_raises(tmp_path, monkeypatch):
    tiny.picture(0, 32).save(tmp_path / "bomb.png")
    open_picture(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="pixels"):
        open_picture(tmp_path / "bomb.png")


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP"]), data=st.data())
def test_a_damaged_file_is_a_picture_or_one_of_two_errors(tmp_path_factory, kind, data):
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(OSError, ValueError):
        assert open_picture(path).mode == "RGB"


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "P"), ("JPEG", "CMYK"), ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "RGB")]
)
def test_bytes_are_opened_as_their_file_is(tmp_path, kind, mode):
    file = io.BytesIO()
    halves().convert(mode).save(file, kind)
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    assert open_picture(file.getvalue()) == open_picture(tmp_path / "a.jpg")


def test_transparent_palettes_become_rgb(tmp_path):
    halves().convert("P").save(tmp_path / "a.png", transparency=0)
    picture = open_picture(tmp_path / "a.png")
    assert picture.mode == "RGB" and near(picture.getpixel((17, 5)), BLUE)


def test_a_format_that_runs_what_is_in_the_file_is_not_opened(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", "EPS")
    with pytest.raises(OSError, match="cannot identify"):
        open_picture(tmp_path / "a.jpg")


def test_whatever_a_decoder_raises_is_of_the_picture(tmp_path, monkeypatch):
    tiny.picture().save(tmp_path / "a.png")

    def fails(*_):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(
        ImageOps, "exif_transpose", fails
    )  # as it does on some EXIF data that it would write again
    with pytest.raises(ValueError, match="error: required argument"):
        open_picture(tmp_path / "a.png")


def bad_examples(**by_source):
    return [
        BadExample(id=f"{source}-{n}", source=source, reason=f"{n}.jpg: missing")
        for source in by_source
        for n in range(by_source[source])
    ]


@pytest.mark.parametrize(
    ("num_bad", "num_examples"), [(0, 1), (1, 100), (7, 700), (29, 2900), (6652, 665_298)]
)
def test_up_to_one_per_cent_may_be_bad(num_bad, num_examples):
    check_bad_share(bad_examples(coco=num_bad), num_examples)


@pytest.mark.parametrize(("num_bad", "num_examples"), [(1, 1), (1, 99), (2, 100), (8, 700), (6653, 665_298)])
def test_more_than_one_per_cent_is_refused(num_bad, num_examples):
    with pytest.raises(UserError, match=f"{num_bad} of {num_examples} rows"):
        check_bad_share(bad_examples(coco=num_bad), num_examples)


def test_a_refusal_counts_by_source_and_gives_examples():
    with pytest.raises(UserError) as error:
        check_bad_share(bad_examples(vg=2, coco=9), 100)
    message = str(error.value)

    assert "coco: 9, vg: 2" in message
    assert "vg-0: 0.jpg: missing" in message and message.count("missing") >= 5
    assert "data.image_folder" in message
