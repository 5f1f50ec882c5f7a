"""Pictures of every format come out as upright RGB, and damaged ones raise one of two errors."""

import io
import os
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from tests.helpers import tiny
from vzip import UserError
from vzip.chat import Chat
from vzip.integrations import answering
from vzip.media import FrameProcessor
from vzip.pictures import MAX_BYTES, MAX_SCANS, open_picture, stored_size, upright_rgb

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


@pytest.mark.parametrize(("name", "dtype"), [("a.png", "uint16"), ("a.tiff", "uint16"), ("a.ppm", "int32")])
def test_deep_grey_keeps_its_shades(tmp_path, name, dtype):
    values = np.array([[0, 1 << 10, 40_000, 65_535]] * 4, dtype=dtype)
    Image.fromarray(values).save(tmp_path / name)
    shades = np.asarray(open_picture(tmp_path / name))[0, :, 0]
    assert shades.tolist() == (values[0] >> 8).tolist()


@pytest.mark.parametrize(
    ("bits", "zero_is", "content", "shades"),
    [
        # Two values of 12 bits in three bytes: black and white.
        (12, 1, b"\x00\x0f\xff", [0, 255]),
        (16, 1, b"\x00\x00\xff\xff", [0, 255]),
        (16, 0, b"\x00\x00\xff\xff", [255, 0]),
    ],
)
def test_a_tiff_of_deep_grey_keeps_its_shades_and_says_which_is_white(
    tmp_path, bits, zero_is, content, shades
):
    tags = {256: 8, 257: 4, 258: bits, 259: 1, 262: zero_is, 277: 1, 278: 4, 279: 4 * bits}
    (tmp_path / "a.tiff").write_bytes(tiff(tags, content * 16))
    assert np.asarray(open_picture(tmp_path / "a.tiff"))[0, :, 0].tolist() == shades * 4


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_values_without_a_known_white_are_refused(tmp_path, dtype):
    picture = Image.fromarray(np.ones((8, 8), dtype=dtype))
    picture.save(tmp_path / "a.tiff")
    for fails in (lambda: open_picture(tmp_path / "a.tiff"), lambda: upright_rgb(picture)):
        with pytest.raises(ValueError, match=r"32 bits .* have no fixed white; save it in 8 bits"):
            fails()


# Limits


def chunk(name, content):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width, height):
    """A PNG file that ends behind its size: a bomb is refused before anything else is read."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def tiff(tags, content):
    """A TIFF file with these tags; 273 and 324, where its content begins, are added."""
    begin = 324 if 322 in tags else 273
    tags = dict(sorted({**tags, begin: 8 + 2 + 12 * (len(tags) + 1) + 4}.items()))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


LARGE_TILES = {256: 8, 257: 8, 258: 8, 262: 1, 322: 50_000, 323: 50_000, 325: 9}


def many_scans():
    """A small JPEG that repeats its last pass."""
    content = encoded("JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + MAX_SCANS * last + content[-2:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png_header(1, 5000), "1 x 5,000 px: each side must have at least 4"),
        (png_header(30, 3), "30 x 3 px: each side must have at least 4"),
        (png_header(8000, 8000), "8,000 x 8,000 px: at most 50,000,000 pixels"),
        (png_header(13_000, 300), "13,000 x 300 px: a side may have at most 12,000"),
        (png_header(5000, 99), "5,000 x 99 px: the longer side may be at most 50 times"),
        (png_header(60_000, 60_000), "60,000 x 60,000|3600000000 pixels"),
        (tiff(LARGE_TILES, bytes(9)), "50,000 x 50,000"),
    ],
    ids=["line", "three pixels", "area", "side", "ratio", "bomb", "tile"],
)
def test_a_picture_beyond_the_limits_is_refused_before_it_is_decoded(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    for fails in (open_picture, stored_size):
        with pytest.raises(ValueError, match=reason):
            fails(tmp_path / "a.png")
    with pytest.raises(ValueError, match=reason):
        open_picture(content)


def test_a_jpeg_of_many_passes_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(many_scans())
    for content in (many_scans(), tmp_path / "a.jpg"):
        with pytest.raises(ValueError, match=r"a JPEG of 1[01][0-9] scans; at most 100"):
            open_picture(content)


def test_a_large_file_and_large_texts_are_refused(tmp_path):
    with (tmp_path / "sparse.png").open("wb") as file:
        file.write(encoded("PNG"))
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="a file of 100,000,001 bytes; at most 100,000,000"):
        open_picture(tmp_path / "sparse.png")

    png = encoded("PNG")
    bomb = zlib.compress(bytes(10**8))
    for name in (b"zTXt", b"iCCP"):
        with pytest.raises(ValueError, match="too large"):
            open_picture(png[:33] + chunk(name, b"a\0\0" + bomb) + png[33:])


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_gif_with_long_comments_is_refused(tmp_path, mode):
    content = io.BytesIO()
    Image.new(mode, (8, 8)).save(content, "GIF", comment=b"short")
    gif = content.getvalue()
    open_picture(gif)

    begin = gif.index(b"!")
    comment = b"!\xfe" + (b"\xff" + b"a" * 255) * 4096 + b"\0"
    (tmp_path / "a.gif").write_bytes(gif[:begin] + comment + gif[begin:])
    with pytest.raises(ValueError, match="a GIF with more than 1,000,000 bytes of comments"):
        open_picture(tmp_path / "a.gif")


def test_every_door_has_the_limits(tmp_path):
    thin = Image.new("RGB", (400, 4))
    thin.save(tmp_path / "a.png")
    processor = FrameProcessor(tiny.processor().image_processor)
    model = tiny.llava()
    chatting = tiny.processor()
    chatting.chat_template = "{{ messages }}"
    doors = [
        lambda: answering._picture(thin),
        lambda: answering._picture(str(tmp_path / "a.png")),
        lambda: answering._frames([thin], 8),
        lambda: Chat(model, chatting, thin),
        lambda: processor([[thin]]),
    ]
    for door in doors:
        with pytest.raises(ValueError, match="400 x 4 px: the longer side"):
            door()


def test_a_task_of_an_evaluation_names_what_can_not_be_shown(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<html>")
    for fails in (answering._picture, lambda path: answering._frames(path, 8)):
        with pytest.raises(UserError, match=r"a\.png can't be shown to the model: .*take it out of the task"):
            fails(str(tmp_path / "a.png"))
    with pytest.raises(UserError, match="a picture of the task can't be shown to the model: 1 x 9 px"):
        answering._picture(Image.new("RGB", (1, 9)))


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.png", tmp_path / "zero.png", tmp_path):
        for fails in (open_picture, stored_size):
            with pytest.raises(ValueError, match="not a file, but a folder, a pipe or a device"):
                fails(path)

    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(OSError, match="symbolic links"):
        open_picture(tmp_path / "loop.png")


@pytest.mark.parametrize(
    ("orientation", "red_at", "blue_at"),
    [(1, (2, 5), (17, 5)), (3, (17, 5), (2, 5)), (6, (5, 2), (5, 17)), (8, (5, 17), (5, 2))],
)
def test_a_photo_of_a_turned_camera_is_upright_in_training_and_in_evaluation(
    tmp_path, orientation, red_at, blue_at
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    halves().save(path, exif=exif, quality=95)

    picture = open_picture(path)
    assert picture.size == ((20, 10) if orientation < 5 else (10, 20))
    assert is_near(picture.getpixel(red_at), RED)
    assert is_near(picture.getpixel(blue_at), BLUE)
    assert answering._picture(str(path)) == picture
    assert answering._picture(Image.open(path)) == picture


def encoded(kind, **options):
    buffer = io.BytesIO()
    tiny.picture(0, 32).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"just text\n", b"{}", encoded("PNG")[:60], encoded("PNG")[:-1000], encoded("JPEG")[:400]],
    ids=["zero bytes", "text", "json", "png header", "part of a png", "part of a jpeg"],
)
def test_other_files_and_names_raise(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    for name in ("a.jpg", "nowhere.jpg", "a\0b.jpg"):
        with pytest.raises((OSError, ValueError)):
            open_picture(tmp_path / name)


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
