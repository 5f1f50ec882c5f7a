"""Pictures are fetched from addresses, folders and zip files, and wrong entries in the settings are named."""

import zipfile

import pytest

from data.fetch.archive import Archive
from data.fetch.http import NotFoundError
from data.fetch.sources import open_sources, parse_source
from tests.helpers.server import Server, client
from vzip import UserError

QUICK = client(attempts=2)


def test_a_base_address_is_that_of_the_data_source(tmp_path):
    names = ["train2017/1.jpg", "train2017/ä b%20?#&+.jpg", "top.jpg"]
    (tmp_path / "zip" / "train2017").mkdir(parents=True)
    for name in names:
        (tmp_path / "zip" / name).write_bytes(name.encode())

    with Server(tmp_path) as server:
        for base in (f"{server.url}/zip", f"{server.url}/zip/", f"{server.url}/zip/?key=secret"):
            source = parse_source(base, QUICK)
            assert str(source) == base.replace("secret", "***")
            for name in names:
                assert source.read(f"coco/{name}") == name.encode()

        assert source.read("top.jpg") == b"top.jpg"
        with pytest.raises(NotFoundError, match=r"/zip/train2017/2\.jpg.*404"):
            source.read("coco/train2017/2.jpg")


def test_a_folder_may_be_that_of_all_pictures_or_lie_deep_below(tmp_path):
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    (tmp_path / "coco" / "train2017" / "1.jpg").write_bytes(b"one")
    with (tmp_path / "coco" / "train2017" / "3.jpg").open("wb") as file:
        file.truncate(200_000_000_000)  # a hole, which takes no room on the disk

    for folder in (tmp_path, tmp_path / "coco", tmp_path / "coco" / "train2017"):
        source = parse_source(str(folder), QUICK)
        assert source.read("coco/train2017/1.jpg") == b"one"
        for path in ("coco/train2017/2.jpg", "coco/train2017"):
            with pytest.raises(NotFoundError, match=path):
                source.read(path)
        with pytest.raises(NotFoundError, match="more than 100,000,000 bytes"):
            source.read("coco/train2017/3.jpg")


@pytest.mark.parametrize("path", ["/etc/hostname", "../a.zip", "coco/../../a.zip"])
def test_paths_that_leave_are_never_read(tmp_path, path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", b"a")
    for entry in (tmp_path, tmp_path / "a.zip", "http://127.0.0.1:1/"):
        with pytest.raises(AssertionError):
            parse_source(str(entry), QUICK).read(path)


@pytest.mark.parametrize(
    "entry",
    ["", "nowhere", "nowhere.zip", "ftp://host/a/", "file:///etc/", "http://", "http://[/", "s3://a/b"],
)
def test_invalid_entries_are_named(entry):
    words = r"data\.pictures\.vg: .* is not a base address .*, a folder, or a zip file"
    with pytest.raises(UserError, match=words):
        open_sources({"coco": None, "vg": [entry]}, QUICK)


def test_the_setting_holds_an_entry_a_list_or_nothing(tmp_path):
    pictures = {"coco": ["http://host/", str(tmp_path)], "vg": "https://host/a.ZIP", "gqa": None, "text": []}
    sources = open_sources(pictures, QUICK)
    names = {name: [str(source) for source in opened] for name, opened in sources.items()}
    assert names == pictures | {"vg": ["https://host/a.ZIP"], "gqa": []}
    assert isinstance(sources["vg"][0], Archive)
    assert open_sources(None, QUICK) == {}

    for wrong in (3, [None], {"a": "b"}, [["http://host/"]]):
        with pytest.raises(UserError, match=r"data\.pictures\.vg=.* must be a list, each entry a base addr"):
            open_sources({"vg": wrong}, QUICK)
