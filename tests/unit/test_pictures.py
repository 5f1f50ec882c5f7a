"""Pictures of every make come out as upright RGB, and those that can't be opened are found before training."""

import io
import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from data.conversations import BadRow, Row
from data.pictures import check_pictures, open_picture, refuse_if_too_bad
from tests import tiny
from vzip import UserError

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
    [b"", b"just text\n", b"{}", encoded("PNG")[:60], encoded("PNG")[: len(encoded("PNG")) // 2], encoded("JPEG")[:400]],
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


def row(name, *images, videos=(), source="noise"):
    return Row(id=name, images=images, videos=videos, turns=(("q", "a"),), source=source, kind="all", digest=name)


def test_check_pictures_parts_good_from_bad_in_order(tmp_path):
    for number in range(30):
        tiny.picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "7.png").write_bytes(b"no picture")
    (tmp_path / "20.png").unlink()
    rows = [row(f"row-{number}", f"{number}.png") for number in range(30)]
    rows += [row("text"), row("pair", "1.png", "2.png"), row("broken pair", "1.png", "7.png", source="pairs")]
    good, bad = check_pictures(rows, tmp_path)

    assert [row.id for row in good] == [row.id for row in rows if row.id not in ("row-7", "row-20", "broken pair")]
    assert [(row.id, row.source) for row in bad] == [("row-7", "noise"), ("row-20", "noise"), ("broken pair", "pairs")]
    assert bad[1].reason == "20.png: missing"
    assert "7.png" in bad[0].reason and "7.png" in bad[2].reason


def test_check_pictures_looks_at_videos_too(tmp_path):
    for number in range(3):
        (tmp_path / "clip").mkdir(exist_ok=True)
        tiny.picture(number).save(tmp_path / "clip" / f"{number}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("just text\n")
    rows = [
        row("frames", videos=("clip",)),
        row("gone", videos=("clip", "gone.mp4"), source="valley"),
        row("empty", videos=("empty",)),
        row("text", videos=("text.mp4",)),
        row("both", "clip/1.png", videos=("clip",)),
        row("bad picture", "clip/9.png", videos=("clip",)),
    ]
    good, bad = check_pictures(rows, tmp_path)

    assert [row.id for row in good] == ["frames", "both"]
    assert [row.id for row in bad] == ["gone", "empty", "text", "bad picture"]
    assert bad[0] == BadRow(id="gone", source="valley", reason="gone.mp4: missing")
    assert "no frames" in bad[1].reason and "not a video" in bad[2].reason and bad[3].reason == "clip/9.png: missing"


def test_without_pyav_no_row_is_blamed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # makes its import fail
    (tmp_path / "a.mp4").write_bytes(b"...")
    with pytest.raises(UserError, match="pip install av"):
        check_pictures([row("a", videos=("a.mp4",))], tmp_path)


def test_no_rows_need_no_pictures(tmp_path):
    assert check_pictures([], tmp_path) == ([], [])


def bad_rows(**by_source):
    return [
        BadRow(id=f"{source}-{n}", source=source, reason=f"{n}.jpg: missing")
        for source in by_source
        for n in range(by_source[source])
    ]


@pytest.mark.parametrize(("num_bad", "num_rows"), [(0, 1), (1, 100), (7, 700), (29, 2900), (6652, 665_298)])
def test_up_to_one_per_cent_may_be_bad(num_bad, num_rows):
    refuse_if_too_bad(bad_rows(coco=num_bad), num_rows)


@pytest.mark.parametrize(("num_bad", "num_rows"), [(1, 1), (1, 99), (2, 100), (8, 700), (6653, 665_298)])
def test_more_than_one_per_cent_is_refused(num_bad, num_rows):
    with pytest.raises(UserError, match=f"{num_bad} of {num_rows} rows"):
        refuse_if_too_bad(bad_rows(coco=num_bad), num_rows)


def test_a_refusal_counts_by_source_and_gives_examples():
    with pytest.raises(UserError) as error:
        refuse_if_too_bad(bad_rows(vg=2, coco=9), 100)
    message = str(error.value)

    assert "coco: 9, vg: 2" in message
    assert "vg-0: 0.jpg: missing" in message and message.count("missing") >= 5
    assert "data.image_folder" in message
