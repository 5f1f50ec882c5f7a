"""Pictures are taken from addresses, folders and zip files: of those only what is wanted is read, and never another."""

import random
import struct
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.fetch.http import NotFoundError, TransientError
from data.fetch.sources import Archive, open_sources, parse_source
from tests.helpers.server import Server, client
from vzip import UserError

pytestmark = pytest.mark.slow

QUICK = client(attempts=2)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def content_of(name, num_bytes=3000):
    """Bytes that belong to one name: half of them compress."""
    return (name.encode() + b"|").ljust(num_bytes // 2, b".") + random.Random(name).randbytes(num_bytes // 2)


def save_zip(path, names, *, method=zipfile.ZIP_DEFLATED, num_bytes=3000, **options):
    """A zip file of names; {name: content}."""
    contents = {name: content_of(name, num_bytes) for name in names}
    with zipfile.ZipFile(path, "w", method, **options) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return contents


def read_all(place, paths):
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(paths, pool.map(place.read, paths), strict=True))


def test_a_base_address_is_that_of_the_source(tmp_path):
    (tmp_path / "zip" / "train2017").mkdir(parents=True)
    names = ["train2017/1.jpg", "train2017/ä b%20?#&+.jpg", "top.jpg"]
    for name in names:
        (tmp_path / "zip" / name).write_bytes(name.encode())
    with Server(tmp_path) as server:
        for base in (f"{server.url}/zip", f"{server.url}/zip/", f"{server.url}/zip/?key=secret"):
            place = parse_source(base, QUICK)
            assert [place.read(f"coco/{name}") for name in names] == [name.encode() for name in names]
        assert place.read("top.jpg") == b"top.jpg" and str(place).endswith("secret")
        with pytest.raises(NotFoundError, match=r"/zip/train2017/2\.jpg.*404"):
            place.read("coco/train2017/2.jpg")


@pytest.mark.parametrize("below", ["", "coco", "coco/train2017"])
def test_a_folder_may_be_that_of_all_pictures_or_lie_deep_below(tmp_path, below):
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    (tmp_path / "coco" / "train2017" / "1.jpg").write_bytes(b"one")
    place = parse_source(str(tmp_path / below), QUICK)
    assert place.read("coco/train2017/1.jpg") == b"one"
    for path in ("coco/train2017/2.jpg", "coco/train2017"):
        with pytest.raises(NotFoundError, match=path):
            place.read(path)


@pytest.mark.parametrize("path", ["/etc/hostname", "../a.zip", "coco/../../a.zip"])
def test_paths_that_leave_are_never_read(tmp_path, path):
    save_zip(tmp_path / "a.zip", ["a.jpg"])
    for entry in (tmp_path, tmp_path / "a.zip", "http://127.0.0.1:1/"):
        with pytest.raises(AssertionError):
            parse_source(str(entry), QUICK).read(path)


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]


@pytest.mark.parametrize("method", METHODS)
def test_members_of_a_zip_file_are_read_in_parallel(tmp_path, method):
    contents = save_zip(tmp_path / "a.zip", [f"images/{number}.jpg" for number in range(300)], method=method)
    found = read_all(parse_source(str(tmp_path / "a.zip"), QUICK), [f"gqa/{name}" for name in contents])
    assert found == {f"gqa/{name}": content for name, content in contents.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("method", METHODS)
def test_of_a_zip_file_at_an_address_only_the_wanted_members_come(tmp_path, method):
    names = [f"images/{number}.jpg" for number in range(600)]
    contents = save_zip(tmp_path / "a.zip", names, method=method, num_bytes=20_000)
    with Server(tmp_path, delay_s=0.002) as server:
        place = parse_source(f"{server.url}/a.zip?download=true", QUICK)
        wanted = names[::60]
        assert read_all(place, [f"gqa/{name}" for name in wanted]) == {
            f"gqa/{name}": contents[name] for name in wanted
        }
        size = (tmp_path / "a.zip").stat().st_size
        assert size > 6_000_000 and server.sent["/a.zip"] < 128 * 1024 + 10 * 22_000
        assert server.requests["/a.zip"] == 2 + len(
            wanted
        )  # its size, its tail with the directory, and each member
        assert server.max_concurrent > 1


def test_a_directory_that_is_longer_than_what_is_read_first(tmp_path, monkeypatch):
    names = [f"images/{number:060}.jpg" for number in range(3000)]
    contents = save_zip(tmp_path / "a.zip", names, num_bytes=10)
    monkeypatch.setattr("data.fetch.archive.BLOCK", 50_000)
    with Server(tmp_path) as server:
        place = parse_source(f"{server.url}/a.zip", QUICK)
        assert place.read(f"gqa/{names[7]}") == contents[names[7]]
        assert 4 <= server.requests["/a.zip"] < 20


def test_zip64_and_very_many_members(tmp_path):
    """More members than the old format can count."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(70_000):
            archive.writestr(zipfile.ZipInfo(f"images/{number}.jpg"), b"%d" % number)
    with Server(tmp_path) as server:
        for entry in (str(tmp_path / "a.zip"), f"{server.url}/a.zip"):
            place = parse_source(entry, QUICK)
            assert [place.read(f"gqa/images/{number}.jpg") for number in (0, 65_535, 69_999)] == [
                b"0",
                b"65535",
                b"69999",
            ]


def test_members_behind_four_gigabytes(tmp_path):
    with (tmp_path / "a.zip").open("wb") as file:
        file.truncate(5 << 30)  # a hole, which takes no room on the disk
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("images/1.jpg", b"content")
        assert archive.getinfo("images/1.jpg").header_offset == 5 << 30
    with Server(tmp_path) as server:
        for entry in (str(tmp_path / "a.zip"), f"{server.url}/a.zip"):
            assert parse_source(entry, QUICK).read("gqa/images/1.jpg") == b"content"
        assert server.sent["/a.zip"] < 200_000


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (["images/1.jpg"], "gqa/images/1.jpg", "images/1.jpg"),
        (["gqa/images/1.jpg", "images/1.jpg"], "gqa/images/1.jpg", "gqa/images/1.jpg"),
        (["all/gqa/images/1.jpg", "old/images/1.jpg"], "gqa/images/1.jpg", "all/gqa/images/1.jpg"),
        (["x/y/images/1.jpg"], "gqa/images/1.jpg", "x/y/images/1.jpg"),
        (["1.jpg"], "gqa/images/1.jpg", "1.jpg"),
        (["1.jpg", "images/1.jpg", "old/images/1.jpg"], "gqa/images/1.jpg", "images/1.jpg"),
        (["VG_100K_2/1.jpg"], "vg/VG_100K/1.jpg", None),
        (["images/11.jpg"], "gqa/images/1.jpg", None),
        (["images/1.jpg/"], "gqa/images/1.jpg", None),
        (["train/images/1.jpg", "test/images/1.jpg"], "gqa/images/1.jpg", None),
        (["bücher/é.jpg"], "ocr_vqa/bücher/é.jpg", "bücher/é.jpg"),
        (["a/1.jpg"], "1.jpg", "a/1.jpg"),
    ],
)
def test_the_member_is_the_one_with_the_longest_common_end(tmp_path, names, path, expected):
    contents = save_zip(tmp_path / "a.zip", names)
    place = parse_source(str(tmp_path / "a.zip"), QUICK)
    if expected is None:
        with pytest.raises(NotFoundError, match=path):
            place.read(path)
    else:
        assert place.read(path) == contents[expected]


def test_headers_that_are_longer_than_the_directory_says(tmp_path):
    """Some programs write more about a member before it than in the directory."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("images/1.jpg")
        info.extra = struct.pack("<HH", 0xCAFE, 5000) + bytes(5000)
        archive.writestr(info, b"content")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.index(b"PK\1\2")  # the directory: take the same out of it
    (name_length,) = struct.unpack_from("<H", data, at + 28)
    struct.pack_into("<H", data, at + 30, 0)
    del data[at + 46 + name_length : at + 46 + name_length + 5004]
    struct.pack_into("<I", data, len(data) - 10, len(data) - 22 - at)
    (tmp_path / "a.zip").write_bytes(data)
    with Server(tmp_path) as server:
        for entry in (str(tmp_path / "a.zip"), f"{server.url}/a.zip"):
            assert parse_source(entry, QUICK).read("gqa/images/1.jpg") == b"content"


def damage(path, name, how):
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    if how == "encrypted":
        data[entry + 8] |= 1
    elif how == "checksum":
        data[data.index(name.encode()) + 400] ^= 255
    elif how == "not there":
        struct.pack_into("<I", data, entry + 42, 77)
    elif how == "outside":
        struct.pack_into("<I", data, entry + 42, 0x7FFFFFFF)
    elif how == "huge":
        struct.pack_into("<I", data, entry + 24, 0x70000000)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("encrypted", "is encrypted"),
        ("checksum", "is damaged"),
        ("not there", "is damaged: it is not where"),
        ("outside", "is damaged: it lies outside"),
        ("huge", r"has 1,879,048,192 bytes; at most 100,000,000 are allowed"),
        ("bzip2", "is compressed by method 12"),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_members_that_can_not_be_read_are_gone(tmp_path, how, words, remote):
    save_zip(
        tmp_path / "a.zip",
        ["images/1.jpg"],
        method=zipfile.ZIP_BZIP2 if how == "bzip2" else zipfile.ZIP_DEFLATED,
    )
    damage(tmp_path / "a.zip", "images/1.jpg", how)
    with Server(tmp_path) as server:
        place = parse_source(f"{server.url}/a.zip" if remote else str(tmp_path / "a.zip"), QUICK)
        with pytest.raises(NotFoundError, match=rf"images/1\.jpg in .*a\.zip {words}"):
            place.read("gqa/images/1.jpg")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), method=st.sampled_from(METHODS))
def test_a_mangled_zip_file_gives_the_right_bytes_or_one_of_two_errors(tmp_path_factory, data, method):
    path = tmp_path_factory.getbasetemp() / "mangled.zip"
    contents = save_zip(path, ["images/1.jpg", "images/2.jpg", "b/3.jpg"], method=method, num_bytes=60)
    mangled = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at, new = data.draw(st.integers(0, len(mangled) - 1)), data.draw(st.binary(max_size=4))
        mangled[at : at + data.draw(st.sampled_from([0, len(new)]))] = new
    path.write_bytes(mangled[: data.draw(st.integers(len(mangled) // 2, len(mangled)))])
    for name, content in contents.items():
        try:
            assert parse_source(str(path), QUICK).read(f"gqa/{name}") == content
        except (NotFoundError, UserError) as error:
            assert "mangled.zip" in str(error)


@pytest.mark.parametrize("content", [b"", b"<html>no</html>", b"PK\5\6" + bytes(10)])
def test_a_zip_file_that_is_none_is_the_users_mistake(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    with Server(tmp_path) as server:
        for entry in (str(tmp_path / "a.zip"), f"{server.url}/a.zip"):
            (place,) = open_sources({"gqa": entry}, QUICK)["gqa"]
            for _ in range(2):
                with pytest.raises(
                    UserError, match=r"data\.pictures\.gqa: .*a\.zip can't be read as a zip file"
                ):
                    place.read("gqa/images/1.jpg")


@pytest.mark.parametrize(
    ("fault", "words"), [("404", "answered 404"), ("whole", "sends no parts of files.*give its path")]
)
def test_a_zip_file_at_a_wrong_address_is_the_users_mistake(tmp_path, fault, words):
    save_zip(tmp_path / "a.zip", ["images/1.jpg"])
    with Server(tmp_path, {"/a.zip": fault}) as server:
        (place,) = open_sources({"gqa": [f"{server.url}/a.zip"]}, QUICK)["gqa"]
        with pytest.raises(UserError, match=rf"(?s)data\.pictures\.gqa: .*{words}"):
            place.read("gqa/images/1.jpg")


def test_a_zip_file_whose_server_is_down_is_asked_once_for_all_threads(tmp_path):
    save_zip(tmp_path / "a.zip", ["images/1.jpg"])
    with Server(tmp_path, {"/a.zip": "503"}) as server:
        place, errors = parse_source(f"{server.url}/a.zip", QUICK), []

        def read():
            with pytest.raises(TransientError) as error:
                place.read("gqa/images/1.jpg")
            errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 8 and server.requests["/a.zip"] == QUICK.attempts


def test_faults_on_the_way_are_survived(tmp_path):
    contents = save_zip(tmp_path / "a.zip", [f"images/{number}.jpg" for number in range(40)])
    faults = ["503", "drop", None, "truncate", None, "429", None, None, "drop", "stall"] * 3
    with Server(tmp_path, {"/a.zip": faults}) as server:
        place = parse_source(f"{server.url}/a.zip", client(attempts=8, read_s=1.0))
        found = read_all(place, [f"gqa/{name}" for name in contents])
        assert [found[f"gqa/{name}"] for name in contents] == list(contents.values())


@pytest.mark.parametrize(
    "entry",
    ["", "nowhere", "nowhere.zip", "ftp://host/a/", "file:///etc/", "http://", "http://[/", "s3://a/b"],
)
def test_entries_that_are_no_place_are_the_users_mistake(entry):
    with pytest.raises(
        UserError, match=r"data\.pictures\.vg: .* is not a base address .*, a folder, or a zip file"
    ):
        open_sources({"coco": None, "vg": [entry]}, QUICK)


@pytest.mark.parametrize("entries", [3, [None], {"a": "b"}, [["http://host/"]]])
def test_what_is_no_list_of_places_is_the_users_mistake(entries):
    with pytest.raises(UserError, match=r"data\.pictures\.vg=.* must be a list, each entry"):
        open_sources({"vg": entries}, QUICK)


def test_places_of_all_sources(tmp_path):
    places = open_sources(
        {"coco": ["http://host/", str(tmp_path)], "vg": "https://host/a.ZIP", "gqa": None, "text": []}, QUICK
    )
    assert {source: [str(place) for place in found] for source, found in places.items()} == {
        "coco": ["http://host/", str(tmp_path)],
        "vg": ["https://host/a.ZIP"],
        "gqa": [],
        "text": [],
    }
    assert isinstance(places["vg"][0], Archive) and open_sources(None, QUICK) == {}
