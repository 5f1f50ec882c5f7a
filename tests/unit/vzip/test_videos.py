"""Frames of videos are the right ones, whatever the container says, and files that can't be read are
told apart.
"""

import os
import sys
from contextlib import suppress

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import tiny
from vzip import UserError
from vzip.integrations import answering
from vzip.pictures import open_picture
from vzip.videos import check_video, read_frames, sample

NUM_FRAMES = 75  # 3 s
SIDE = 64


def numbered(number):
    """The bits of a number as eight black and white columns, which survive lossy coding: uint8[SIDE,
    SIDE, 3].
    """
    bits = np.array([255 * (number >> bit & 1) for bit in range(8)], dtype=np.uint8)
    return np.broadcast_to(bits.repeat(SIDE // 8)[None, :, None], (SIDE, SIDE, 3)).copy()


def numbers_of(frames):
    """The numbers that `numbered` wrote."""
    numbers = []
    for frame in frames:
        is_white = np.asarray(frame).mean((0, 2)).reshape(8, -1).mean(1) > 127
        numbers.append(int(np.packbits(is_white, bitorder="little")[0]))
    return numbers


def write_video(path, *, num_frames=NUM_FRAMES, codec="mpeg4", pixels=None, title="", **options):
    """A video of 25 frames a second; by default frame i is `numbered(i)`."""
    with av.open(str(path), "w", options=options) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in range(num_frames):
            content = numbered(number) if pixels is None else pixels
            container.mux(stream.encode(av.VideoFrame.from_ndarray(content, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        for start in range(0, 16_384, 1024):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16_000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("num_total", "num_frames", "numbers"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (75, 8, [0, 10, 21, 31, 42, 52, 63, 74]),
        (100, 1, [0]),
        (100, 2, [0, 99]),
        (3, 8, [0, 0, 0, 0, 1, 1, 1, 2]),
        (1, 4, [0, 0, 0, 0]),
    ],
)
def test_frames_are_spread_from_the_first_to_the_last(num_total, num_frames, numbers):
    assert sample(num_total, num_frames) == numbers


@pytest.mark.parametrize(("num_total", "num_frames"), [(0, 8), (-1, 8), (8, 0), (8, -1)])
def test_no_frames_are_an_error(num_total, num_frames):
    with pytest.raises(ValueError, match="frames"):
        sample(num_total, num_frames)


FILES = ("a.mp4", "a.avi", "no frame count.mkv", "no index.ts")


@pytest.mark.parametrize(("name", "codec"), [("b.mp4", "libx264"), *((name, "mpeg4") for name in FILES)])
def test_frames_of_a_file_are_the_sampled_ones(tmp_path, name, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg was built without {codec}")
    path = write_video(tmp_path / name, codec=codec)
    frames = read_frames(path, 8)

    assert numbers_of(frames) == sample(NUM_FRAMES, 8)
    assert all(frame.mode == "RGB" and frame.size == (SIDE, SIDE) for frame in frames)
    assert numbers_of(read_frames(path, 1)) == [0]
    check_video(path)


@pytest.mark.parametrize("claimed", [40, 200])
def test_a_frame_count_that_is_wrong_does_no_harm(tmp_path, claimed):
    path = write_video(tmp_path / "a.avi")
    content = bytearray(path.read_bytes())
    start = content.index(b"strh") + 8 + 32  # the stream header's dwLength
    assert int.from_bytes(content[start : start + 4], "little") == NUM_FRAMES
    content[start : start + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == claimed

    assert numbers_of(read_frames(path, 8)) == sample(NUM_FRAMES, 8)


def write_sideways(path):
    """A video of a phone that was held sideways: white on the left of each frame, to be shown a
    quarter turn clockwise.
    """
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:, : SIDE // 2] = 255
    write_video(path, num_frames=3, pixels=pixels)

    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # the track's matrix
    unit = 0x10000
    matrix = (0, unit, 0, -unit, 0, 0, SIDE * unit, 0, 0x40000000)
    content[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(content)


def test_a_phone_held_sideways_is_upright_in_training_and_in_evaluation(tmp_path):
    path = tmp_path / "phone.mp4"
    write_sideways(path)
    for frames in (read_frames(path, 1), answering._frames(str(path), 1)):
        frame = frames[0].convert("L")
        assert frame.getpixel((SIDE // 2, 4)) > 200
        assert frame.getpixel((SIDE // 2, SIDE - 4)) < 50


def test_a_folder_of_frames_is_taken_in_natural_order(tmp_path):
    for number in range(12):
        Image.fromarray(numbered(number)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "frames.txt").write_text("no frame")
    (tmp_path / ".frame_3.png").write_bytes(b"what a file manager leaves")

    assert numbers_of(read_frames(tmp_path, 12)) == list(range(12))
    assert numbers_of(read_frames(tmp_path, 5)) == sample(12, 5)
    assert numbers_of(read_frames(tmp_path, 24)) == sample(12, 24)
    check_video(tmp_path)

    # Names may mix text and numbers, so that a number is compared with a text.
    for name in ("02b.png", "10.png", "a.png", "a01.png", "a2c.png", "b.png"):
        tiny.picture(0, 8).save(tmp_path / name)
    assert len(read_frames(tmp_path, 18)) == 18


def assert_raises(path, reason):
    """Neither the check before training nor the reader takes this file or folder."""
    for fails in (check_video, lambda path: read_frames(path, 8)):
        with pytest.raises((OSError, ValueError), match=reason):
            fails(path)


def test_a_folder_without_pictures_and_one_with_a_broken_picture_raise(tmp_path):
    assert_raises(tmp_path, "no frames")
    tiny.picture().save(tmp_path / "2.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    assert_raises(tmp_path, r"1\.png")


def cut_video(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


FAULTS = {
    "missing": (lambda path: path, "No such file"),
    "text": (lambda path: path.write_text("just text\n" * 50) and path, "not a video"),
    "zero bytes": (lambda path: path.touch() or path, "not a video"),
    "sound": (write_sound, "no video stream"),
    "index lost": (lambda path: cut_video(write_video(path), 0.6), "not a video, or its end is missing"),
    "frames lost": (lambda path: cut_video(write_video(path, movflags="faststart"), 0.6), "truncated"),
    "no frames": (lambda path: write_video(path, num_frames=0), None),
    "an impossible name": (lambda path: path.with_name("a\0b.mp4"), None),
}


@pytest.mark.parametrize(("make", "reason"), FAULTS.values(), ids=FAULTS)
def test_other_files_raise(tmp_path, make, reason):
    assert_raises(make(tmp_path / "a.mp4"), reason)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "frames").mkdir()
    os.mkfifo(tmp_path / "frames" / "1.png")
    for path in (tmp_path / "a.mp4", tmp_path / "frames"):
        assert_raises(path, "not a file, but")


def test_frames_have_the_limits_of_pictures(tmp_path):
    thin = np.zeros((4, 400, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 400, 4, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(thin, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "frames").mkdir()
    Image.fromarray(thin).save(tmp_path / "frames" / "1.png")

    for path in (tmp_path / "a.avi", tmp_path / "frames"):
        assert_raises(path, "400 x 4 px: the longer side")


def test_a_title_that_is_not_utf8_does_no_harm(tmp_path):
    path = write_video(tmp_path / "a.mkv", title="Szene")
    content = path.read_bytes()
    assert content.count(b"Szene") == 1
    path.write_bytes(content.replace(b"Szene", "Sz\xe8ne".encode("latin-1")))
    check_video(path)
    assert numbers_of(read_frames(path, 8)) == sample(NUM_FRAMES, 8)


def test_the_first_part_of_a_video_that_is_damaged_in_the_middle_is_used(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][40]
        start, length = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    check_video(path)  # its start and its index are whole
    with pytest.warns(UserWarning, match=r"a\.mp4: damaged.* after \d+ frames"):
        numbers = numbers_of(read_frames(path, 8))
    assert numbers == sample(numbers[-1] + 1, 8) and 30 <= numbers[-1] < 40


@given(name=st.sampled_from(["a.mp4", "a.avi", "a.mkv"]), data=st.data())
def test_a_damaged_file_has_frames_or_one_of_two_errors(tmp_path_factory, name, data):
    whole = tmp_path_factory.getbasetemp() / f"whole {name}"
    if not whole.exists():
        write_video(whole, num_frames=6)

    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged {name}"
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    for read in (check_video, lambda path: read_frames(path, 4)):
        with suppress(OSError, ValueError):
            read(path)


def test_without_pyav_files_are_refused_and_folders_are_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # makes its import fail
    tiny.picture().save(tmp_path / "1.png")
    (tmp_path / "a.mp4").write_bytes(b"...")
    (tmp_path / "frames").mkdir()
    tiny.picture().save(tmp_path / "frames" / "1.png")

    with pytest.raises(UserError, match=r"pip install 'vzip\[video\]'"):
        check_video(tmp_path / "a.mp4")
    with pytest.raises(FileNotFoundError):
        check_video(tmp_path / "b.mp4")
    check_video(tmp_path / "frames")
    assert read_frames(tmp_path / "frames", 2) == [open_picture(tmp_path / "1.png")] * 2
