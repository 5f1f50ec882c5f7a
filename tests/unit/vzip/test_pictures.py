"""Pictures of every format come out as upright RGB, and damaged ones raise one of two errors."""

import io
import struct
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from tests.helpers import tiny
from vzip.integrations import answering
from vzip.pictures import open_picture

RED = (255, 0, 0)
BLUE = (0, 0, 255)


def halves():
    """20 x 10 px: red on the left, blue on the right."""
    picture = Image.new("RGB", (20, 10), RED)
    picture.paste(BLUE, (10, 0, 20, 10))
    return picture


def is_near(pixel, colour):
    return all(abs(a - b) < 60 for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize(
    ("name", "kind", "mode", "options"),
    [
        ("a.png", "PNG", "RGB", {}),
        ("a.png", "PNG", "RGBA", {}),
        ("palette.png", "PNG", "P", {}),
        ("transparent.png", "PNG", "P", {"transparency": 0}),
        ("a.gif", "GIF", "P", {}),
        ("a.jpg", "JPEG", "RGB", {}),
        ("cmyk.jpg", "JPEG", "CMYK", {}),
        ("really_a_gif.jpg", "GIF", "P", {}),
        ("really_a_png.jpg", "PNG", "RGB", {}),
        ("no_suffix", "PNG", "RGB", {}),
        ("a.webp", "WEBP", "RGB", {}),
        ("a.tiff", "TIFF", "RGB", {}),
    ],
)
def test_every_format_becomes_rgb(tmp_path, name, kind, mode, options):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow was built without WebP")
    halves().convert(mode).save(tmp_path / name, kind, **options)
    picture = open_picture(tmp_path / name)

    assert (picture.mode, picture.size) == ("RGB", (20, 10))
    assert is_near(picture.getpixel((17, 5)), BLUE)
    if not options:
        assert is_near(picture.getpixel((2, 5)), RED)
    assert open_picture((tmp_path / name).read_bytes()) == picture


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_becomes_rgb(tmp_path, mode):
    Image.new("L", (8, 6), 255).convert(mode).save(tmp_path / "grey.png")
    assert open_picture(tmp_path / "grey.png") == Image.new("RGB", (8, 6), "white")


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
def test_a_photo_of_a_turned_camera_is_upright_in_training_and_in_evaluation(
    tmp_path, orientation, size, red_at, blue_at
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    halves().save(path, exif=exif, quality=95)

    picture = open_picture(path)
    assert picture.size == size
    assert is_near(picture.getpixel(red_at), RED)
    assert is_near(picture.getpixel(blue_at), BLUE)
    assert answering._picture(str(path)) == picture
    assert answering._picture(Image.open(path)) == picture


def encoded(kind):
    buffer = io.BytesIO()
    tiny.picture(0, 32).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"just text\n", b"{}", encoded("PNG")[:60], encoded("PNG")[:-1000], encoded("JPEG")[:400]],
    ids=["zero bytes", "text", "json", "png header", "part of a png", "part of a jpeg"],
)
def test_other_files_raise(tmp_path, content):
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


def test_a_format_that_runs_the_file_is_not_opened(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", "EPS")
    with pytest.raises(OSError, match="cannot identify"):
        open_picture(tmp_path / "a.jpg")


def test_any_error_of_a_decoder_counts_as_damage(tmp_path, monkeypatch):
    tiny.picture().save(tmp_path / "a.png")

    def fails(*_):
        raise struct.error("required argument is not an integer")

    # It does so for some EXIF data that it would write again.
    monkeypatch.setattr(ImageOps, "exif_transpose", fails)
    with pytest.raises(ValueError, match="error: required argument"):
        open_picture(tmp_path / "a.png")


@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP"]), data=st.data())
def test_a_damaged_file_is_a_picture_or_one_of_two_errors(tmp_path_factory, kind, data):
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, min(len(content), 200) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(OSError, ValueError):
        assert open_picture(path).mode == "RGB"
