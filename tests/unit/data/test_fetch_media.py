"""Every picture of a subset is whole in its folder, or has a reason, whatever servers, files, disks
and kills do.
"""

import errno
import io
import os
import struct
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data.fetch.media import fetch_media
from data.fetch.media_index import MediaIndex
from data.fetch.sources import open_sources
from tests.helpers import tiny
from tests.helpers.broken import encoded
from tests.helpers.server import Server, client
from vzip import UserError
from vzip.files import machine_name
from vzip.pictures import open_picture

pytestmark = pytest.mark.slow


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def publish(folder, num_pictures):
    """Write pictures train/0.jpg, ... of several sizes below published/. Returns them as media of "coco"."""
    for number in range(num_pictures):
        content = encoded(size=(8 + number % 5, 8), seed=number % 20)
        save(folder / "published" / "train" / f"{number}.jpg", content)
    return media_of(*(f"train/{number}.jpg" for number in range(num_pictures)))


def media_of(*names, kind="image"):
    return [(kind, f"coco/{name}", "coco") for name in names]


class Command:
    """A folder, its index and the sources, as a new command finds them."""

    def __init__(self, folder, *, read_s=30.0, **pictures):
        self.folder = folder / "images"
        self.index_path = folder / "checked.jsonl"
        self.sources = open_sources(pictures, client(read_s=read_s))

    def fetch(self, media, **options):
        return fetch_media(media, self.folder, sources=self.sources, media_index=self.index(), **options)

    def index(self):
        return MediaIndex(self.index_path)

    def num_lines(self):
        return len(self.index_path.read_text().splitlines())

    def files(self):
        """Paths of all files, leftovers too."""
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}


def test_pictures_are_fetched_once(tmp_path):
    media = publish(tmp_path, 60)
    with Server(tmp_path / "published", delay_s=0.01) as server:
        command = Command(tmp_path, coco=[server.url])
        assert command.fetch(media[:50] + media[:20]) == {}
        assert set(server.requests.values()) == {1}
        assert len(server.requests) == 50
        assert 4 < server.max_concurrent <= 32
        assert command.files() == {path for _, path, _ in media[:50]}
        for path in command.files():
            published = tmp_path / "published" / path.removeprefix("coco/")
            assert (command.folder / path).read_bytes() == published.read_bytes()

        # Nothing is looked at twice.
        assert command.fetch(media) == {}
        assert set(server.requests.values()) == {1}
        assert len(server.requests) == 60
        assert command.num_lines() == 60

    expected = {path: (8, 8 + number % 5) for number, (_, path, _) in enumerate(media)}
    assert command.index().sizes() == expected


def bomb():
    """A PNG file of 400 megapixels in a few bytes."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6
GOOD = {
    "jpeg": encoded(),
    "gif": encoded("GIF", "P"),
    "png": encoded("PNG"),
    "cmyk": encoded("JPEG", "CMYK"),
    "transparent": encoded("PNG", "P", transparency=0),
    "rgba": encoded("PNG", "RGBA"),
    "deep": encoded("PNG", "I;16"),
    "webp": encoded("WEBP"),
    "sideways": encoded(exif=SIDEWAYS),
}
BAD = {
    "empty": b"",
    "html": b"<html><body>Not found</body></html>",
    "truncated": encoded(size=(200, 200))[:-5000],
    "bomb": bomb(),
    "wide": encoded("PNG", size=(2000, 5)),
}


@pytest.mark.parametrize("is_there", [True, False], ids=["there", "fetched"])
def test_the_traps_of_real_data(tmp_path, is_there):
    """All are named .jpg."""
    for name, content in (GOOD | BAD).items():
        save(tmp_path / ("images/coco" if is_there else "published") / f"{name}.jpg", content)
    with Server(tmp_path / "published") as server:
        command = Command(tmp_path, **({} if is_there else {"coco": server.url}))
        faults = command.fetch(media_of(*(f"{name}.jpg" for name in [*GOOD, *BAD, "gone"])))
        # A bad picture may have broken on its way, so it is asked for twice.
        for name in BAD:
            assert server.requests[f"/{name}.jpg"] == (0 if is_there else 2)

    assert set(faults) == {f"coco/{name}.jpg" for name in [*BAD, "gone"]}
    assert all(fault.final for fault in faults.values())
    reasons = {
        "bomb": "pixels",
        "html": "cannot identify",
        "truncated": "truncated",
        "wide": "the longer side",
    }
    reasons["gone"] = "missing" if is_there else "answered 404"
    for name, words in reasons.items():
        assert words in faults[f"coco/{name}.jpg"].reason

    sizes = {f"coco/{name}.jpg": (10, 20) for name in GOOD}
    sizes["coco/sideways.jpg"] = (20, 10)
    assert command.index().sizes() == sizes
    for name, content in GOOD.items():
        assert (command.folder / f"coco/{name}.jpg").read_bytes() == content
    if not is_there:
        assert command.files() == set(sizes)


def test_sources_are_asked_in_turn(tmp_path):
    media = publish(tmp_path, 4)
    near = tmp_path / "near"
    save(near / "0.jpg", encoded())
    save(near / "1.jpg", b"damaged")
    with Server(tmp_path / "published", {"/train/3.jpg": "404"}) as server:
        faults = Command(tmp_path, coco=[str(near), server.url]).fetch(media)
        assert server.requests == {f"/train/{number}.jpg": 1 for number in (1, 2, 3)}

    (fault,) = faults.values()
    missing_there = f"{server.url}/train/3.jpg: answered 404 Not Found"
    assert fault.reason == f"{near} holds no coco/train/3.jpg; {missing_there}"


def test_faults_that_may_pass_are_tried_by_the_next_command_and_final_ones_are_not(tmp_path):
    media = publish(tmp_path, 6)
    plan = {"/train/1.jpg": ["503"] * 3, "/train/2.jpg": "404", "/train/3.jpg": "html"}
    with Server(tmp_path / "published", plan) as server:
        command = Command(tmp_path, coco=server.url)
        faults = command.fetch(media)
        assert {path[-5]: fault.final for path, fault in faults.items()} == {"1": False, "2": True, "3": True}
        assert "answered 503" in faults["coco/train/1.jpg"].reason

        before = server.requests.copy()
        again = command.fetch(media)
        assert set(again) == {"coco/train/2.jpg", "coco/train/3.jpg"}
        assert again.items() <= faults.items()
        assert server.requests - before == {"/train/1.jpg": 1}


def test_a_fault_is_forgotten_with_its_reason(tmp_path):
    """A new source, a file put there by hand, another file instead of a damaged one: each is looked at."""
    media = media_of("0.jpg", "1.jpg", "2.jpg", "3.jpg")
    save(tmp_path / "images/coco/2.jpg", b"damaged")
    assert set(Command(tmp_path).fetch(media)) == {f"coco/{number}.jpg" for number in range(4)}

    save(tmp_path / "images/coco/1.jpg", encoded())
    save(tmp_path / "images/coco/2.jpg", encoded())
    assert set(Command(tmp_path).fetch(media)) == {"coco/0.jpg", "coco/3.jpg"}

    save(tmp_path / "published/0.jpg", encoded())
    assert set(Command(tmp_path, coco=str(tmp_path / "published")).fetch(media)) == {"coco/3.jpg"}


def test_a_source_whose_address_holds_a_key_is_asked_again(tmp_path):
    """The key may have expired: then the fault goes with a new one. No record holds the key."""
    media = publish(tmp_path, 1)
    with Server(tmp_path / "published", {"/train/0.jpg": ["404"]}) as server:
        command = Command(tmp_path, coco=f"{server.url}/?sig=s3cret")
        (fault,) = command.fetch(media).values()
        assert fault.final and "?sig=***: answered 404" in fault.reason
        assert "s3cret" not in command.index_path.read_text()
        assert command.fetch(media) == {}


def test_a_file_that_changed_or_went_is_looked_at_again(tmp_path):
    media = publish(tmp_path, 3)
    with Server(tmp_path / "published") as server:
        command = Command(tmp_path, coco=server.url)
        command.fetch(media)
        (command.folder / "coco/train/0.jpg").unlink()
        save(command.folder / "coco/train/1.jpg", encoded()[:100])

        # What a killed command left goes, and what belongs to a process that runs stays.
        of_another = f"coco/train/2.jpg.{machine_name()}-{os.getppid()}-0a.vzip-tmp"
        of_another_host = "coco/train/2.jpg.other_host-1-999999999-0a.vzip-tmp"
        killed = f"coco/train/2.jpg.{machine_name()}-999999999-0a.vzip-tmp"
        for leftover in (of_another, of_another_host, killed):
            save(command.folder / leftover, b"half a pict")
        assert command.fetch(media) == {}
        assert server.requests == {"/train/0.jpg": 2, "/train/1.jpg": 2, "/train/2.jpg": 1}

    assert command.files() == {path for _, path, _ in media} | {of_another, of_another_host}
    assert open_picture(command.folder / "coco/train/1.jpg").size == (9, 8)


def test_a_read_only_folder_is_enough_where_all_is_there(tmp_path, monkeypatch):
    media = publish(tmp_path, 4)
    command = Command(tmp_path, coco=str(tmp_path / "published"))
    command.fetch(media[:3])
    save(command.folder / "coco/train/0.jpg", b"damaged")
    command.index_path.unlink()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    # As on a disk that is mounted read-only. Root may write whatever the mode says.
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(command.folder))
    (damaged,) = command.fetch(media[:3]).items()
    assert damaged[0] == "coco/train/0.jpg" and "cannot identify" in damaged[1].reason

    words = r"data\.image_folder: .*3\.jpg is missing, and can't be written \(Read-only"
    with pytest.raises(UserError, match=words):
        command.fetch(media)


def test_a_full_disk_ends_the_command_and_leaves_nothing_half(tmp_path, monkeypatch):
    media = publish(tmp_path, 10)
    command = Command(tmp_path, coco=str(tmp_path / "published"))
    real_write = Path.write_bytes
    written = []

    def write(path, data):
        written.append(path)
        if len(written) > 4:
            real_write(path, data[:50])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        with pytest.raises(OSError, match="No space"):
            command.fetch(media, num_threads=1)

    # A thread may have begun with the next picture.
    deadline = time.monotonic() + 30
    while any(path.endswith("tmp") for path in command.files()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(command.files()) >= 4
    for path in command.files():
        open_picture(command.folder / path)
    assert command.fetch(media) == {}


@pytest.mark.parametrize("kind", ["404", "503", "html", "nobody"])
def test_a_wrong_address_is_not_asked_thousands_of_times(tmp_path, kind):
    media = media_of(*(f"train/{number}.jpg" for number in range(3000)))
    with Server(tmp_path, lambda path: kind) as server:
        url = server.url if kind != "nobody" else "http://127.0.0.1:9"
        command = Command(tmp_path, coco=[url])
        words = rf"(?s)data\.pictures\.coco: none of the first 50 pictures .*{url}.*{url}"
        with pytest.raises(UserError, match=words):
            command.fetch(media)
        assert len(server.requests) < 150

    assert command.num_lines() == 50


def test_a_network_that_goes_away_in_the_middle_ends_the_command_and_dead_links_do_not(tmp_path):
    media = publish(tmp_path, 300)
    save(tmp_path / "other/0.jpg", encoded())

    def after_sixty(fault):
        return lambda path: None if int(Path(path).stem) < 60 else fault

    with Server(tmp_path / "published", after_sixty("503")) as server:
        command = Command(tmp_path, coco=server.url, vg=str(tmp_path / "other"))
        with pytest.raises(UserError, match=r"coco: 50 pictures in a row could not be fetched"):
            command.fetch([*media, ("image", "vg/0.jpg", "vg")])
        assert len(server.requests) < 200

    with Server(tmp_path / "published") as server:
        assert Command(tmp_path, coco=server.url).fetch(media) == {}
        assert len(server.requests) == 240  # those that came were kept

    with Server(tmp_path / "published", after_sixty("404")) as server:
        assert len(Command(tmp_path / "other", coco=server.url).fetch(media, num_threads=3)) == 240
        # The server may still be ending one answer to each thread that asks again.
        assert server.max_concurrent <= 6


def test_videos_are_checked_and_fetched_too(tmp_path):
    av = pytest.importorskip("av")
    clip = io.BytesIO()
    with av.open(clip, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for picture in tiny.video(num_frames=3):
            container.mux(stream.encode(av.VideoFrame.from_image(picture.resize((32, 32)))))
        container.mux(stream.encode())

    for number in range(2):
        save(tmp_path / "images/coco/frames" / f"{number}.png", encoded("PNG"))
    (tmp_path / "images/coco/empty").mkdir()
    save(tmp_path / "images/coco/text.mp4", b"just text\n")
    save(tmp_path / "published/clip.mp4", clip.getvalue())

    command = Command(tmp_path, coco=str(tmp_path / "published"))
    for _ in range(2):
        faults = command.fetch(media_of("frames", "empty", "text.mp4", "clip.mp4", "gone.mp4", kind="video"))
        assert set(faults) == {"coco/empty", "coco/text.mp4", "coco/gone.mp4"}
        assert "no frames" in faults["coco/empty"].reason
    assert command.num_lines() == 5
    assert command.index().sizes() == {}
    assert (command.folder / "coco/clip.mp4").read_bytes() == clip.getvalue()


def test_without_pyav_no_video_is_blamed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # makes its import fail
    save(tmp_path / "images/coco/a.mp4", b"...")
    with pytest.raises(UserError, match=r"pip install 'vzip\[video\]'"):
        Command(tmp_path).fetch(media_of("a.mp4", kind="video"))


def test_paths_that_no_file_can_have_are_faults(tmp_path):
    images = tmp_path / "images/coco"
    (images / "folder").mkdir(parents=True)
    save(images / "there.jpg", encoded())
    (images / "loop").symlink_to(images / "loop")
    (images / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(images / "pipe.jpg")
    save(tmp_path / "published/a.jpg/b.jpg", encoded())
    (images / "a.jpg").symlink_to(tmp_path / "nowhere")  # a file where a folder would have to be

    long = "a" * 300
    impossible = ["a\0b.jpg", f"{long}.jpg", f"{long}/b.jpg", "there.jpg/b.jpg", "folder", "ü\n\u2028.jpg"]
    impossible += ["loop/1.jpg", "zero.jpg", "pipe.jpg", "a.jpg/b.jpg"]
    command = Command(tmp_path, coco=str(tmp_path / "published"))
    for _ in range(2):
        faults = command.fetch(media_of("there.jpg", *impossible))
        assert set(faults) == {f"coco/{name}" for name in impossible}
        assert "can't be written" in faults["coco/a.jpg/b.jpg"].reason
        assert "a pipe or a device" in faults["coco/pipe.jpg"].reason
    assert command.index().sizes() == {"coco/there.jpg": (10, 20)}


def test_an_interrupted_command_ends_at_once(tmp_path, monkeypatch):
    """Threads that wait for a server that stalls are left behind."""
    media = publish(tmp_path, 40)
    plan = {f"/train/{number}.jpg": "stall" for number in range(20, 40)}
    real_record = MediaIndex.record

    def record(index, entry):
        real_record(index, entry)
        if len(index.sizes()) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(MediaIndex, "record", record)
    with Server(tmp_path / "published", plan) as server:
        command = Command(tmp_path, coco=server.url, read_s=180.0)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            command.fetch(media, num_threads=8)
        assert time.monotonic() - start < 120  # and not the 180 that an answer is waited for
    assert len(command.index().sizes()) == 10
