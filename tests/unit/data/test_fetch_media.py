"""Every picture of a subset is whole in its folder, or has a reason: whatever servers, files, disks and kills do meanwhile."""

import errno
import io
import json
import os
import random
import signal
import struct
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.fetch.media import fetch_media
from data.fetch.media_index import Checked, MediaIndex
from data.fetch.sources import open_sources, parse_source
from tests.helpers import tiny
from tests.helpers.server import Server, client, seeded
from vzip import UserError
from vzip.pictures import open_picture

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def encoded(kind="JPEG", mode="RGB", *, size=(20, 10), seed=0, **options):
    """Bytes of a noisy picture of a size (width, height)."""
    file = io.BytesIO()
    tiny.picture(seed, size[1], size[0]).convert(mode).save(file, kind, **options)
    return file.getvalue()


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def publish(folder, num_pictures, *, source="coco"):
    """Pictures 0.jpg, ... below `folder`/train, as media of a source; their sizes differ."""
    for number in range(num_pictures):
        save(folder / "train" / f"{number}.jpg", encoded(size=(8 + number % 5, 8), seed=number % 20))
    return [("image", f"{source}/train/{number}.jpg", source) for number in range(num_pictures)]


class Run:
    """A folder and a ledger, and the state that a new command finds them in."""

    def __init__(self, folder, *, read_s=30.0, **pictures):
        self.folder, self.path = folder / "images", folder / "checked.jsonl"
        self.sources = open_sources(pictures, client(read_s=read_s))

    def fetch(self, media, **options):
        return fetch_media(
            media, self.folder, sources=self.sources, media_index=MediaIndex(self.path), **options
        )

    def lines(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def files(self):
        """Paths of all files, leftovers too."""
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}


def media_of(*names, kind="image", source="coco"):
    return [(kind, f"coco/{name}", source) for name in names]


def test_pictures_come_from_their_places_once(tmp_path):
    media = publish(tmp_path / "published", 60)
    with Server(tmp_path / "published", delay_s=0.01) as server:
        run = Run(tmp_path, coco=[server.url])
        assert run.fetch(media[:50] + media[:20]) == {}
        assert set(server.requests.values()) == {1} and len(server.requests) == 50
        assert 4 < server.max_concurrent <= 32
        for _, path, _ in media[:50]:
            assert (run.folder / path).read_bytes() == (
                tmp_path / "published" / path.removeprefix("coco/")
            ).read_bytes()
        assert run.files() == {path for _, path, _ in media[:50]}

        assert run.fetch(media) == {}
        assert set(server.requests.values()) == {1} and len(server.requests) == 60
        assert len(run.lines()) == 60  # nothing was looked at twice
    sizes = MediaIndex(run.path).sizes()
    assert sizes == {path: (8, 8 + number % 5) for number, (_, path, _) in enumerate(media)}


def test_no_more_threads_than_asked_for(tmp_path):
    media = publish(tmp_path / "published", 20)
    with Server(tmp_path / "published", delay_s=0.01) as server:
        assert Run(tmp_path, coco=[server.url]).fetch(media, num_threads=3) == {}
        assert server.max_concurrent <= 3


def test_only_the_subset_of_a_zip_file_at_an_address_comes(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(400):
            archive.writestr(f"images/{number}.jpg", encoded("BMP", size=(60, 60), seed=number % 5))
    media = [("image", f"gqa/images/{number}.jpg", "gqa") for number in range(0, 400, 40)]
    with Server(tmp_path) as server:
        run = Run(tmp_path, gqa=[f"{server.url}/images.zip"])
        assert run.fetch(media) == {} and len(MediaIndex(run.path).sizes()) == 10
        assert (
            server.sent["/images.zip"]
            < 128 * 1024 + 10 * 13_000
            < (tmp_path / "images.zip").stat().st_size / 10
        )


def bomb():
    """A PNG file of 400 megapixels in a few bytes."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def deep():
    file = io.BytesIO()
    Image.frombytes("I;16", (20, 10), bytes(400)).save(file, "PNG")
    return file.getvalue()


def sideways():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


GOOD = {
    "jpeg": encoded(),
    "gif": encoded("GIF", "P"),
    "png": encoded("PNG"),
    "cmyk": encoded("JPEG", "CMYK"),
    "grey": encoded("JPEG", "L"),
    "palette": encoded("PNG", "P"),
    "transparent": encoded("PNG", "P", transparency=0),
    "rgba": encoded("PNG", "RGBA"),
    "deep": deep(),
    "webp": encoded("WEBP"),
    "sideways": sideways(),
}
BAD = {
    "empty": b"",
    "html": b"<html><body>Not found</body></html>",
    "truncated": encoded(size=(200, 200))[:-5000],
    "half a png": encoded("PNG", size=(90, 90))[:9000],
    "bomb": bomb(),
}


@pytest.mark.parametrize("there", [True, False], ids=["there", "brought"])
def test_the_traps_of_real_data(tmp_path, there):
    """All are named .jpg."""
    for name, content in (GOOD | BAD).items():
        save(tmp_path / ("images/coco" if there else "published") / f"{name}.jpg", content)
    with Server(tmp_path / "published") as server:
        run = Run(tmp_path, **({} if there else {"coco": server.url}))
        faults = run.fetch(media_of(*(f"{name}.jpg" for name in [*GOOD, *BAD, "gone"])))
        assert all(
            server.requests[f"/{name}.jpg"] == (0 if there else 2) for name in BAD
        )  # it may have broken on the way
    assert set(faults) == {f"coco/{name}.jpg" for name in [*BAD, "gone"]}
    assert all(fault.final for fault in faults.values())
    reasons = {
        path.removeprefix("coco/").removesuffix(".jpg"): fault.reason for path, fault in faults.items()
    }
    assert (
        "pixels" in reasons["bomb"]
        and "cannot identify" in reasons["html"]
        and "truncated" in reasons["truncated"]
    )
    assert reasons["gone"] == "missing" if there else "answered 404" in reasons["gone"]
    assert MediaIndex(run.path).sizes() == {
        f"coco/{name}.jpg": (20, 10) if name == "sideways" else (10, 20) for name in GOOD
    }
    for name, content in GOOD.items():  # bytes stay as they came
        assert (run.folder / f"coco/{name}.jpg").read_bytes() == content
    assert there or run.files() == {f"coco/{name}.jpg" for name in GOOD}


@pytest.mark.parametrize("fault", ["drop", "truncate", "stall", "429", "503", "html", "short"])
def test_faults_that_pass_cost_no_picture(tmp_path, fault):
    media = publish(tmp_path / "published", 60)
    plan = seeded([fault], 0.1)
    num_hit = sum(bool(plan(path.removeprefix("coco"))) for _, path, _ in media)
    with Server(tmp_path / "published", plan) as server:
        # Of 32 threads beside the server's, one may wait for a second or two before it runs.
        assert Run(tmp_path, coco=server.url, read_s=4.0 if fault == "stall" else 30.0).fetch(media) == {}
        assert num_hit >= 3 and sum(server.requests.values()) == 60 + num_hit


def test_all_faults_at_once(tmp_path):
    media = publish(tmp_path / "published", 200)
    plan = seeded(["drop", "truncate", "429", "503", "html", "404", "302"], 0.3)
    dead = {path for _, path, _ in media if "404" in plan(path.removeprefix("coco"))}
    with Server(tmp_path / "published", plan) as server:
        faults = Run(tmp_path, coco=server.url).fetch(media)
    assert set(faults) == dead and len(dead) > 2


def test_places_are_asked_in_turn(tmp_path):
    media = publish(tmp_path / "far", 4)
    save(tmp_path / "near" / "0.jpg", encoded())
    save(tmp_path / "near" / "1.jpg", b"damaged")
    with Server(tmp_path / "far", {"/train/3.jpg": "404"}) as server:
        faults = Run(tmp_path, coco=[str(tmp_path / "near"), server.url]).fetch(media)
        assert server.requests == {f"/train/{number}.jpg": 1 for number in (1, 2, 3)}
    (fault,) = faults.values()
    assert (
        fault.reason
        == f"{tmp_path}/near holds no coco/train/3.jpg; {server.url}/train/3.jpg: answered 404 Not Found"
    )


def test_faults_that_may_pass_are_tried_by_the_next_command_and_final_ones_are_not(tmp_path):
    media = publish(tmp_path / "published", 6)
    plan = {"/train/1.jpg": ["503"] * 3, "/train/2.jpg": "404", "/train/3.jpg": "html"}
    with Server(tmp_path / "published", plan) as server:
        run = Run(tmp_path, coco=server.url)
        faults = run.fetch(media)
        assert {path[-5]: fault.final for path, fault in faults.items()} == {"1": False, "2": True, "3": True}
        assert "answered 503" in faults["coco/train/1.jpg"].reason
        before = server.requests.copy()
        again = run.fetch(media)
        assert set(again) == {"coco/train/2.jpg", "coco/train/3.jpg"} and again.items() <= faults.items()
        assert server.requests - before == {"/train/1.jpg": 1}


def test_a_fault_is_forgotten_with_its_reason(tmp_path):
    """A new place, a file put there by hand, another file in place of a damaged one: each is looked at."""
    media = media_of("0.jpg", "1.jpg", "2.jpg", "3.jpg")
    save(tmp_path / "images/coco/2.jpg", b"damaged")
    assert set(Run(tmp_path).fetch(media)) == {f"coco/{number}.jpg" for number in range(4)}
    save(tmp_path / "images/coco/1.jpg", encoded())
    save(tmp_path / "images/coco/2.jpg", encoded())
    assert set(Run(tmp_path).fetch(media)) == {"coco/0.jpg", "coco/3.jpg"}
    save(tmp_path / "published/0.jpg", encoded())
    assert set(Run(tmp_path, coco=str(tmp_path / "published")).fetch(media)) == {"coco/3.jpg"}


def test_a_file_that_changed_or_went_is_looked_at_again(tmp_path):
    media = publish(tmp_path / "published", 3)
    with Server(tmp_path / "published") as server:
        run = Run(tmp_path, coco=server.url)
        run.fetch(media)
        (run.folder / "coco/train/0.jpg").unlink()
        save(run.folder / "coco/train/1.jpg", encoded()[:100])
        assert run.fetch(media) == {}
        assert server.requests == {"/train/0.jpg": 2, "/train/1.jpg": 2, "/train/2.jpg": 1}
    assert open_picture(run.folder / "coco/train/1.jpg").size == (9, 8)


@contextmanager
def frozen(folder):
    """A folder that nobody may write to, as on a disk that is mounted read-only; root may write whatever the mode says."""
    real_mkdir, real_write, real_access = Path.mkdir, Path.write_bytes, os.access
    error = OSError(errno.EROFS, "Read-only file system")

    def refuse(real):
        def call(path, *arguments, **options):
            if folder in path.parents:
                raise error
            return real(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse(real_mkdir))
        patch.setattr(Path, "write_bytes", refuse(real_write))
        patch.setattr(
            os, "access", lambda path, mode: folder not in Path(path, "x").parents and real_access(path, mode)
        )
        yield


def test_a_folder_that_is_read_only_is_enough_where_all_is_there(tmp_path):
    media = publish(tmp_path / "published", 4)
    run = Run(tmp_path, coco=str(tmp_path / "published"))
    run.fetch(media[:3])
    save(run.folder / "coco/train/0.jpg", b"damaged")
    run.path.unlink()
    with frozen(run.folder):
        faults = run.fetch(media[:3])
        assert set(faults) == {"coco/train/0.jpg"} and "cannot identify" in faults["coco/train/0.jpg"].reason
        with pytest.raises(
            UserError, match=r"data\.image_folder: .*3\.jpg is missing, and can't be written \(Read-only"
        ):
            run.fetch(media)


def test_a_full_disk_ends_the_command_and_leaves_nothing_half(tmp_path, monkeypatch):
    media = publish(tmp_path / "published", 10)
    run, real_write, written = Run(tmp_path, coco=str(tmp_path / "published")), Path.write_bytes, []

    def write(path, data):
        written.append(path)
        if len(written) > 4:
            real_write(path, data[:50])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        with pytest.raises(OSError, match="No space") as error:
            run.fetch(media, num_threads=1)
        assert error.value.errno == errno.ENOSPC
    deadline = time.monotonic() + 5
    while any(path.endswith("tmp") for path in run.files()) and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread may have begun with the next picture
    assert len(run.files()) >= 4 and all(open_picture(run.folder / path) for path in run.files())
    assert run.fetch(media) == {}


@pytest.mark.parametrize("kind", ["404", "503", "html", "nobody"])
def test_a_wrong_address_is_not_asked_thousands_of_times(tmp_path, kind):
    media = [("image", f"coco/train/{number}.jpg", "coco") for number in range(3000)]
    with Server(tmp_path, lambda path: kind) as server:
        url = server.url if kind != "nobody" else "http://127.0.0.1:9"
        run = Run(tmp_path, coco=[url])
        with pytest.raises(
            UserError, match=rf"(?s)data\.pictures\.coco: none of the first 50 pictures .*{url}.*{url}"
        ):
            run.fetch(media)
        assert len(server.requests) < 150
    assert len(run.lines()) == 50


def test_a_network_that_goes_away_in_the_middle_ends_the_command(tmp_path):
    media = publish(tmp_path / "published", 300)
    save(tmp_path / "other/0.jpg", encoded())
    with Server(tmp_path / "published", lambda path: None if int(Path(path).stem) < 60 else "503") as server:
        run = Run(tmp_path, coco=server.url, vg=str(tmp_path / "other"))
        with pytest.raises(UserError, match=r"coco: 50 pictures in a row could not be fetched"):
            run.fetch([*media, ("image", "vg/0.jpg", "vg")])
        assert len(server.requests) < 200
    with Server(tmp_path / "published") as server:
        run = Run(tmp_path, coco=server.url)
        assert run.fetch(media) == {} and len(server.requests) == 240  # what came is kept


def test_many_dead_links_among_good_ones_end_nothing(tmp_path):
    media = publish(tmp_path / "published", 300)
    with Server(tmp_path / "published", lambda path: "404" if int(Path(path).stem) >= 60 else None) as server:
        assert len(Run(tmp_path, coco=server.url).fetch(media)) == 240


def test_a_place_that_is_none_ends_the_command(tmp_path):
    save(tmp_path / "a.zip", b"no zip file")
    with pytest.raises(UserError, match=r"data\.pictures\.coco: .*a\.zip can't be read as a zip file"):
        Run(tmp_path, coco=str(tmp_path / "a.zip")).fetch(media_of("1.jpg"))


def test_videos_are_looked_at_and_brought_too(tmp_path):
    for number in range(2):
        save(tmp_path / "images/coco/frames" / f"{number}.png", encoded("PNG"))
    (tmp_path / "images/coco/empty").mkdir()
    save(tmp_path / "images/coco/text.mp4", b"just text\n")
    save(tmp_path / "published/clip.mp4", moving())
    media = media_of("frames", "empty", "text.mp4", "clip.mp4", "gone.mp4", kind="video")
    run = Run(tmp_path, coco=str(tmp_path / "published"))
    for _ in range(2):
        faults = run.fetch(media)
        assert set(faults) == {"coco/empty", "coco/text.mp4", "coco/gone.mp4"}
        assert "no frames" in faults["coco/empty"].reason
    assert len(run.lines()) == 5 and MediaIndex(run.path).sizes() == {}
    assert (run.folder / "coco/clip.mp4").read_bytes() == moving()


def moving():
    """An MP4 file of three frames."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for picture in tiny.video(num_frames=3):
            container.mux(stream.encode(av.VideoFrame.from_image(picture.resize((32, 32)))))
        container.mux(stream.encode())
    return file.getvalue()


def test_without_pyav_no_video_is_blamed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # makes its import fail
    save(tmp_path / "images/coco/a.mp4", b"...")
    with pytest.raises(UserError, match="pip install av"):
        Run(tmp_path).fetch(media_of("a.mp4", kind="video"))


@pytest.mark.parametrize(
    "name",
    [
        "a\0b.jpg",
        "a" * 300 + ".jpg",
        "a" * 300 + "/b.jpg",
        "there.jpg/b.jpg",
        "folder",
        "ü\n\u2028.jpg",
        "loop/1.jpg",
    ],
)
def test_paths_that_no_file_can_have_are_faults(tmp_path, name):
    save(tmp_path / "images/coco/there.jpg", encoded())
    (tmp_path / "images/coco/folder").mkdir()
    (tmp_path / "images/coco/loop").symlink_to(tmp_path / "images/coco/loop")
    (tmp_path / "published").mkdir()
    run = Run(tmp_path, coco=str(tmp_path / "published"))
    for _ in range(2):
        faults = run.fetch(media_of("there.jpg", name))
        assert set(faults) == {f"coco/{name}"} and faults[f"coco/{name}"].final
    assert len(run.lines()) == 2


def test_nothing_to_bring_takes_nothing(tmp_path):
    assert Run(tmp_path).fetch([]) == {} and not (tmp_path / "images").exists()


def test_a_place_that_answers_for_paths_that_can_not_be_written(tmp_path):
    """A file where a folder would have to be: only that picture is lost."""
    save(tmp_path / "published/a.jpg/b.jpg", encoded())
    save(tmp_path / "published/c.jpg", encoded())
    save(tmp_path / "images/coco/x", encoded())
    run = Run(tmp_path, coco=str(tmp_path / "published"))
    assert run.fetch(media_of("c.jpg")) == {}
    (run.folder / "coco/a.jpg").symlink_to(tmp_path / "nowhere")
    faults = run.fetch(media_of("a.jpg/b.jpg", "c.jpg"))
    assert set(faults) == {"coco/a.jpg/b.jpg"} and "can't be written" in faults["coco/a.jpg/b.jpg"].reason


def killed_after(num_pictures, run, media):
    """Brings media in another process, and kills it when so many are there."""
    if not (child := os.fork()):
        run.fetch(media, num_threads=8)
        os._exit(0)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and len(list(run.folder.rglob("*.jpg"))) < num_pictures:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_command_that_is_killed_goes_on(tmp_path):
    media = publish(tmp_path / "published", 200)
    with Server(tmp_path / "published", delay_s=0.1) as server:
        run = Run(tmp_path, coco=server.url)
        killed_after(40, run, media)
        there = [path for path in run.folder.rglob("*.jpg")]
        assert 40 <= len(there) < 200, "the command ended before the kill"
        for path in there:
            open_picture(path)  # nothing is half
        save(run.folder / "coco/train/7.jpg.999999999-1.vzip-tmp", b"half a pict")
        save(run.folder / f"coco/train/8.jpg.{os.getppid()}-1.vzip-tmp", b"of a process that is there")
        with run.path.open("a") as file:
            file.write('{"path": "coco/train/199.jpg", "by')

        before = server.requests.copy()
        assert run.fetch(media) == {}
        again = server.requests - before
        assert len(again) == 200 - len(there) and not {f"/train/{path.name}" for path in there} & set(again)
    leftover = f"coco/train/8.jpg.{os.getppid()}-1.vzip-tmp"
    assert run.files() == {path for _, path, _ in media} | {leftover}
    assert set(MediaIndex(run.path).sizes()) == {path for _, path, _ in media}


def test_an_interrupted_command_ends_at_once(tmp_path):
    """Though a server stalls: the threads that wait for it are left behind."""
    media, seen = publish(tmp_path / "published", 40), []
    plan = {f"/train/{number}.jpg": "stall" for number in range(20, 40)}

    class Impatient(MediaIndex):
        def record(self, entry):
            super().record(entry)
            seen.append(entry)
            if len(seen) == 10:
                raise KeyboardInterrupt

    with Server(tmp_path / "published", plan) as server:
        sources = {"coco": [parse_source(server.url, client())]}
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            fetch_media(
                media,
                tmp_path / "images",
                sources=sources,
                media_index=Impatient(tmp_path / "checked.jsonl"),
                num_threads=8,
            )
        assert time.monotonic() - start < 15  # and not the 30 that an answer is waited for
    assert len(MediaIndex(tmp_path / "checked.jsonl").sizes()) == 10


def test_a_ledger_keeps_what_it_was_told(tmp_path):
    path = tmp_path / "checked.jsonl"
    media_index = MediaIndex(path)
    assert media_index.sizes() == {} and not path.exists()
    media_index.record(Checked("a\n.jpg", 10, 3, 4, "ab"))
    media_index.record(Checked("b.jpg", -1, fault="gone ü", final=False, tried=("http://x/",)))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"path": "a\n.jpg", "bytes": 10, "height": 3, "width": 4, "digest": "ab"},
        {"path": "b.jpg", "bytes": -1, "fault": "gone ü", "final": False, "tried": ["http://x/"]},
    ]
    again = MediaIndex(path)
    assert again.sizes() == {"a\n.jpg": (3, 4)} and again._entries == media_index._entries
    again.record(Checked("a\n.jpg", 10, fault="now it is damaged"))
    assert MediaIndex(path).sizes() == {}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_ledger_that_was_cut_or_mangled_loses_only_those_lines(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ledger") / "checked.jsonl"
    media_index = MediaIndex(path)
    for number in range(4):
        media_index.record(Checked(f"{number}.jpg", 10 + number, 5, 6))
    content = path.read_bytes()
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
        whole = content.count(b"\n") + (content[-1:] == b"}")
    else:
        lines = content.splitlines(keepends=True)
        lines[0] = data.draw(
            st.sampled_from([b"[]\n", b"3\n", b"{}\n", b'{"path": 1}\n', b"\xff\xfe\n", b"\n", b"null\n"])
        )
        content, whole = b"".join(lines), 3
    path.write_bytes(content)
    again = MediaIndex(path)
    assert len(again.sizes()) == whole
    again.record(Checked("new.jpg", 1, 2, 3))
    assert MediaIndex(path).sizes() == again.sizes() and len(again.sizes()) == whole + 1


SEEDS = [*GOOD.values(), encoded("TIFF"), encoded("BMP", "P")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of damaged tags
@settings(max_examples=150, deadline=None)
@given(seed=st.sampled_from(SEEDS), number=st.integers(0, 2**32), num_changes=st.integers(0, 8))
def test_whatever_comes_is_a_good_picture_or_a_fault(tmp_path_factory, seed, number, num_changes):
    draw, content = random.Random(number), bytearray(seed)
    for _ in range(num_changes):
        at = (
            draw.randrange(len(content) + 1)
            if draw.random() < 0.5
            else draw.randrange(min(len(content), 120) + 1)
        )
        new = draw.choice([b"", draw.randbytes(1), draw.randbytes(4), b"\xff\xff\xff\xff", b"\0\0\0\0"])
        content[at : at + draw.choice([0, 1, len(new)])] = new
    folder = tmp_path_factory.mktemp("mangled")
    save(folder / "published/1.jpg", content)
    run = Run(folder, coco=str(folder / "published"))
    faults = run.fetch(media_of("1.jpg"), num_threads=1)
    file = run.folder / "coco/1.jpg"
    if faults:
        assert faults["coco/1.jpg"].final and faults["coco/1.jpg"].reason and run.files() == set()
    else:
        assert (
            MediaIndex(run.path).sizes() == {"coco/1.jpg": open_picture(file).size[::-1]}
            and file.read_bytes() == content
        )
