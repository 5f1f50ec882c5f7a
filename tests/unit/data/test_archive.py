"""Of a zip file only the wanted members are read, and never a wrong one, whatever is in it and
wherever it lies.
"""

import os
import random
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.fetch.http import NotFoundError, TransientError
from data.fetch.sources import open_sources, parse_source
from tests.helpers.server import Server, client
from vzip import UserError

QUICK = client(attempts=2)
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]


def content_of(name, num_bytes):
    """Bytes that belong to one name: half of them compress."""
    half = num_bytes // 2
    return (name.encode() + b"|").ljust(half, b".") + random.Random(name).randbytes(half)


def save_zip(folder, names, *, method=zipfile.ZIP_DEFLATED, num_bytes=3000):
    """Write a.zip. Returns {name: content}."""
    contents = {name: content_of(name, num_bytes) for name in names}
    with zipfile.ZipFile(folder / "a.zip", "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return contents


def open_both(folder, server):
    """a.zip as a source on disk, and as one at an address."""
    return [parse_source(entry, QUICK) for entry in (str(folder / "a.zip"), f"{server.url}/a.zip")]


def read_all(source, names):
    """Read members in many threads."""
    with ThreadPoolExecutor(16) as pool:
        contents = pool.map(source.read, [f"gqa/{name}" for name in names])
        return dict(zip(names, contents, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_wanted_members_come_and_in_parallel(tmp_path, method):
    names = [f"images/{number}.jpg" for number in range(600)]
    contents = save_zip(tmp_path, names, method=method, num_bytes=20_000)
    wanted = {name: contents[name] for name in names[::60]}
    with Server(tmp_path, delay_s=0.002) as server:
        local = parse_source(str(tmp_path / "a.zip"), QUICK)
        assert read_all(local, wanted) == wanted

        remote = parse_source(f"{server.url}/a.zip?download=true", QUICK)
        assert read_all(remote, wanted) == wanted
        assert (tmp_path / "a.zip").stat().st_size > 6_000_000
        assert server.sent["/a.zip"] < 128 * 1024 + 10 * 22_000
        # Its size, its tail with the directory, and each member.
        assert server.requests["/a.zip"] == 2 + len(wanted)
        assert server.max_concurrent > 1

    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_directory_that_is_longer_than_the_tail(tmp_path, monkeypatch):
    names = [f"images/{number:060}.jpg" for number in range(3000)]
    contents = save_zip(tmp_path, names, num_bytes=10)
    monkeypatch.setattr("data.fetch.archive.BLOCK", 50_000)
    with Server(tmp_path) as server:
        source = parse_source(f"{server.url}/a.zip", QUICK)
        assert source.read(f"gqa/{names[7]}") == contents[names[7]]
        assert 4 <= server.requests["/a.zip"] < 20


@pytest.mark.slow
def test_more_members_than_the_old_format_can_count_behind_four_gigabytes(tmp_path):
    with (tmp_path / "a.zip").open("wb") as file:
        file.truncate(5 << 30)  # a hole, which takes no room on the disk
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        for number in range(66_000):
            archive.writestr(zipfile.ZipInfo(f"images/{number}.jpg"), b"%d" % number)
        assert archive.getinfo("images/0.jpg").header_offset == 5 << 30
    with Server(tmp_path) as server:
        for source in open_both(tmp_path, server):
            for number in (0, 65_535, 65_999):
                assert source.read(f"gqa/images/{number}.jpg") == b"%d" % number


def test_a_directory_that_would_fill_the_memory_is_refused(tmp_path):
    """The end of the file says that its directory has 1.8 GB."""
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 1_800_000_000, 0, 0)
    with (tmp_path / "a.zip").open("wb") as file:
        file.truncate(1_800_000_000)  # a hole, which takes no room on the disk
        file.seek(0, os.SEEK_END)
        file.write(end)
    with Server(tmp_path) as server:
        for source in open_both(tmp_path, server):
            with pytest.raises(UserError, match="directory has more than 500,000,000 bytes"):
                source.read("gqa/images/1.jpg")


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        ("images/1.jpg", "gqa/images/1.jpg", "images/1.jpg"),
        ("gqa/images/1.jpg images/1.jpg", "gqa/images/1.jpg", "gqa/images/1.jpg"),
        ("all/gqa/images/1.jpg old/images/1.jpg", "gqa/images/1.jpg", "all/gqa/images/1.jpg"),
        ("1.jpg images/1.jpg old/images/1.jpg", "gqa/images/1.jpg", "images/1.jpg"),
        ("VG_100K_2/1.jpg", "vg/VG_100K/1.jpg", None),
        ("images/11.jpg", "gqa/images/1.jpg", None),
        ("images/1.jpg/", "gqa/images/1.jpg", None),
        ("train/images/1.jpg test/images/1.jpg", "gqa/images/1.jpg", None),
        ("bücher/é.jpg", "ocr_vqa/bücher/é.jpg", "bücher/é.jpg"),
        ("a/1.jpg", "1.jpg", "a/1.jpg"),
    ],
)
def test_the_member_is_the_one_with_the_longest_common_end(tmp_path, names, path, expected):
    contents = save_zip(tmp_path, names.split())
    source = parse_source(str(tmp_path / "a.zip"), QUICK)
    if expected is None:
        with pytest.raises(NotFoundError, match=path):
            source.read(path)
    else:
        assert source.read(path) == contents[expected]


def test_headers_that_are_longer_than_the_directory_says(tmp_path):
    """Some programs write more about a member before it than in the directory."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("images/1.jpg")
        info.extra = struct.pack("<HH", 0xCAFE, 5000) + bytes(5000)
        archive.writestr(info, b"content")

    # Take the same out of the directory.
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    (name_length,) = struct.unpack_from("<H", data, entry + 28)
    struct.pack_into("<H", data, entry + 30, 0)
    del data[entry + 46 + name_length : entry + 46 + name_length + 5004]
    struct.pack_into("<I", data, len(data) - 10, len(data) - 22 - entry)
    path.write_bytes(data)

    with Server(tmp_path) as server:
        for source in open_both(tmp_path, server):
            assert source.read("gqa/images/1.jpg") == b"content"


@pytest.mark.parametrize(
    ("words", "form", "offset", "value"),
    [
        ("is encrypted", "<H", 8, 1),
        ("is compressed by method 12", "<H", 10, 12),
        ("has 1,879,048,192 bytes; at most 100,000,000 are allowed", "<I", 24, 0x70000000),
        ("is damaged: it is not where", "<I", 42, 77),
        ("is damaged: it lies outside", "<I", 42, 0x7FFFFFFF),
        ("is damaged", "<B", -400, 0),  # in the content, which lies before the directory
    ],
)
def test_members_that_can_not_be_read_are_named(tmp_path, words, form, offset, value):
    """A value is written over what the directory says about a member."""
    save_zip(tmp_path, ["images/1.jpg"])
    data = bytearray((tmp_path / "a.zip").read_bytes())
    struct.pack_into(form, data, data.index(b"PK\1\2") + offset, value)
    (tmp_path / "a.zip").write_bytes(data)
    with Server(tmp_path) as server:
        for source in open_both(tmp_path, server):
            with pytest.raises(NotFoundError, match=rf"images/1\.jpg in .*a\.zip {words}"):
                source.read("gqa/images/1.jpg")


@given(data=st.data(), method=st.sampled_from(METHODS))
def test_a_mangled_zip_file_gives_the_right_bytes_or_one_of_two_errors(tmp_path_factory, data, method):
    folder = tmp_path_factory.mktemp("mangled")
    path = folder / "a.zip"
    contents = save_zip(folder, ["images/1.jpg", "images/2.jpg", "b/3.jpg"], method=method, num_bytes=60)
    mangled = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(mangled) - 1))
        new = data.draw(st.binary(max_size=4))
        mangled[position : position + data.draw(st.sampled_from([0, len(new)]))] = new
    path.write_bytes(mangled[: data.draw(st.integers(len(mangled) // 2, len(mangled)))])

    for name, content in contents.items():
        try:
            assert parse_source(str(path), QUICK).read(f"gqa/{name}") == content
        except (NotFoundError, UserError) as error:
            assert "a.zip" in str(error)


@pytest.mark.parametrize(
    ("content", "fault", "words"),
    [
        (b"", None, "can't be read as a zip file"),
        (b"PK\5\6" + bytes(10), None, "can't be read as a zip file"),
        (b"PK", "404", "answered 404"),
        (b"PK", "whole", "sends no parts of files.*give its path"),
    ],
)
def test_a_wrong_file_or_address_is_the_users_mistake(tmp_path, content, fault, words):
    (tmp_path / "a.zip").write_bytes(content)
    with Server(tmp_path, {"/a.zip": fault}) as server:
        entries = [f"{server.url}/a.zip"] if fault else [str(tmp_path / "a.zip"), f"{server.url}/a.zip"]
        for source in open_sources({"gqa": entries}, QUICK)["gqa"]:
            for _ in range(2):
                with pytest.raises(UserError, match=rf"(?s)data\.pictures\.gqa: .*{words}"):
                    source.read("gqa/images/1.jpg")


def test_a_server_that_is_down_is_asked_once_for_all_threads(tmp_path):
    save_zip(tmp_path, ["images/1.jpg"])
    with Server(tmp_path, {"/a.zip": "503"}) as server, ThreadPoolExecutor(8) as pool:
        source = parse_source(f"{server.url}/a.zip", QUICK)
        for read in [pool.submit(source.read, "gqa/images/1.jpg") for _ in range(8)]:
            with pytest.raises(TransientError):
                read.result()
        assert server.requests["/a.zip"] == QUICK.attempts
