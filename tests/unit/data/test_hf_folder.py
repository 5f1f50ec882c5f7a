"""Folders of Hugging Face `datasets` with the pictures inside are data like any other."""

import json
import os
import shutil
from datetime import datetime

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data.examples.hf_folder import HfFolder
from data.examples.prepare import Selection, prepare
from data.examples.table import open_table
from data.fetch.http import NotFoundError
from tests.helpers import tiny
from tests.helpers.broken import messages
from vzip import UserError
from vzip.pictures import MAX_BYTES, open_picture

datasets = pytest.importorskip("datasets")

ONE_PICTURE = messages("<image>\nwhat?", "a colour")


def select(folder):
    return Selection(path=str(folder), image_folder=str(folder.parent / "images"))


def save_paths(folder, *paths):
    """A `datasets` folder whose pictures are paths."""
    columns = {"image": list(paths), "conversations": [ONE_PICTURE] * len(paths)}
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder with a.jsonl, and a file beside it that it must not name."""
    (tmp_path / "mine").mkdir()
    for path in ("secret.jsonl", "mine/a.jsonl"):
        (tmp_path / path).write_text(json.dumps({"conversations": ONE_PICTURE}))
    return tmp_path / "mine"


def save_colours(folder, colours, **columns):
    """A `datasets` folder of one-coloured pictures, always named train."""
    columns = {name: [value] * len(colours) for name, value in columns.items()}
    columns["image"] = [Image.new("RGB", (8, 8), colour) for colour in colours]
    columns["conversations"] = [ONE_PICTURE] * len(colours)
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(folder / "train")
    return Selection(path=str(folder / "train"), image_folder=str(folder.parent / "images"))


@pytest.mark.parametrize("form", ["saved", "saved with splits", "parquet", "one picture each"])
def test_every_form_of_a_folder_is_data(tmp_path, form):
    pictures = [tiny.picture(number, 12, 16) for number in range(3)]
    columns = {
        "id": ["two", "one", "none"],
        "images": [pictures[:2], pictures[2:], []],
        "conversations": [
            messages("<image><image>\nwhich?", "the first"),
            ONE_PICTURE,
            messages("hello", "hi"),
        ],
    }
    if form == "one picture each":
        columns = {name: values[1:] for name, values in columns.items()}
        columns["image"] = [picture[0] if picture else None for picture in columns.pop("images")]
        data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    else:
        data = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))

    folder = tmp_path / "mine"
    if form == "parquet":
        folder.mkdir()
        data.to_parquet(folder / "train-0.parquet")
    elif form == "saved with splits":
        datasets.DatasetDict(train=data).save_to_disk(folder)
    else:
        data.save_to_disk(folder)

    subset = prepare(select(folder))
    assert sorted(subset.manifest["ids"]) == sorted(columns["id"])
    assert set(subset.manifest["num_rows_by_source"]) == {"mine", "text"}
    assert set(subset.sizes().values()) == {(12, 16)}
    for conversation in subset.conversations():
        assert len(conversation.images) == {"two": 2, "one": 1, "none": 0}[conversation.id]
        assert all((tmp_path / "images" / path).is_file() for path in conversation.images)


def test_a_folder_without_conversations_is_refused(tmp_path):
    datasets.Dataset.from_dict({"id": ["a"]}).save_to_disk(tmp_path / "mine")
    with pytest.raises(UserError, match=r"data\.path=.*no column 'conversations', only id"):
        HfFolder(tmp_path / "mine").dataset  # noqa: B018


def test_pictures_of_folders_of_the_same_name_are_kept_apart(tmp_path):
    subsets = {"red": prepare(save_colours(tmp_path / "a", ["red"]))}
    subsets["blue"] = prepare(save_colours(tmp_path / "b", ["blue"]))
    shutil.rmtree(tmp_path / "a")
    subsets["lime"] = prepare(save_colours(tmp_path / "a", ["lime"]))

    for colour, subset in subsets.items():
        (conversation,) = subset.conversations()
        picture = open_picture(tmp_path / "images" / conversation.images[0])
        assert picture == Image.new("RGB", (8, 8), colour)
    assert len({subset.manifest["hash"] for subset in subsets.values()}) == 3


def test_a_folder_with_columns_of_its_own_is_left_unchanged(tmp_path):
    selection = save_colours(tmp_path / "a", ["red", "blue"], made=datetime(2026, 1, 1), score=float("nan"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    assert prepare(selection).manifest["num_rows"] == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before


def test_paths_are_files_in_the_folder_or_refused(tmp_path):
    folder = save_paths(tmp_path / "mine", "red.png", "red.png")
    with pytest.raises(UserError, match="only 0 of 2 examples of mine can be used"):
        prepare(select(folder))

    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    assert sorted(prepare(select(folder)).manifest["ids"]) == ["0", "1"]


def test_a_picture_outside_of_the_folder_or_without_a_limit_is_never_read(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    paths = ["../secret.png", str(secret), "/dev/zero", "link.png", "pipe.png", "large.png", "a\0b", "", None]
    folder = save_paths(tmp_path / "mine", *paths)
    (folder / "link.png").symlink_to(secret)
    os.mkfifo(folder / "pipe.png")
    with (folder / "large.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)

    source = HfFolder(folder)
    entries = list(source.entries())
    assert len(entries) == len(paths)
    reasons = r"leaves the folder|a pipe or a device|null byte|a file of 100,000,001 bytes"
    for entry in entries[:-2]:
        with pytest.raises(NotFoundError, match=reasons):
            source.read(entry["image"][0])


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    cache = tmp_path / "datasets--me--mine"
    folder = save_paths(cache / "snapshots" / "abc", "red.png")
    (cache / "blobs").mkdir()
    Image.new("RGB", (8, 8), "red").save(cache / "blobs" / "123", "PNG")
    (folder / "red.png").symlink_to("../../blobs/123")
    assert prepare(select(folder)).manifest["num_rows"] == 1


def card(data_files):
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n  - {data_files}\n---\n# Data\n"


def in_json(**content):
    return lambda folder: json.dumps(content)


OUTSIDE = {
    "README.md": lambda folder: card("../secret.jsonl"),
    "README.md ": lambda folder: card(folder.parent / "secret.jsonl"),
    "README.md  ": lambda folder: card("http://127.0.0.1:9/secret.jsonl"),
    ".huggingface.yaml": lambda folder: "configs: [{config_name: default, data_files: ../secret.jsonl}]",
    "state.json": in_json(_data_files=[{"filename": "../secret.arrow"}]),
    "dataset_dict.json": in_json(splits=["../secret"]),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_folder_that_names_data_outside_of_itself_is_refused(folder, name):
    (folder / name.strip()).write_text(OUTSIDE[name](folder))
    with pytest.raises(UserError, match=r"`datasets` can't read this folder: .*leaves the folder"):
        HfFolder(folder).dataset  # noqa: B018


def test_a_card_without_files_is_no_obstacle(folder):
    for text in ("# Pictures: of: mine\n", "Mine: all: mine [", "---\nlicense: mit\n---\nconfigs: /etc"):
        (folder / "README.md").write_text(text)
        assert len(HfFolder(folder).dataset) == 1


def test_what_the_library_chose_is_checked_too(folder, monkeypatch):
    (folder / "a.jsonl").unlink()
    (folder / "README.md").write_text(card("../secret.jsonl"))
    monkeypatch.setattr("data.examples.hf_folder.CARDS", ())
    with pytest.raises(UserError, match=r"secret\.jsonl leaves the folder"):
        HfFolder(folder).dataset  # noqa: B018


BROKEN = {
    "mine.py": "raise SystemExit(3)",
    "README.md": "---\nconfigs: [{\n---\n",
    "state.json": "{",
    "dataset_dict.json": "[]",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_script_and_broken_descriptions_end_in_a_message(folder, name):
    (folder / name).write_text(BROKEN[name])
    with pytest.raises(UserError, match=r"data\.path=.*can't read this folder|is damaged"):
        HfFolder(folder).dataset  # noqa: B018


def test_text_that_is_not_utf8_is_a_listed_row(tmp_path):
    texts = [b"un caf\xc3\xa9", b"un caf\xe9"]
    offsets = np.cumsum([0, *map(len, texts)]).astype("int32")
    identifiers = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))
    columns = pa.table({"id": identifiers, "conversations": [messages("hello", "hi")] * 2})
    datasets.Dataset(columns).save_to_disk(tmp_path / "mine")

    table = open_table(tmp_path / "mine")
    (bad,) = table.bad_examples()
    assert table.conversation(0).id == "un café"
    assert (bad.id, bad.reason[:19]) == ("#1", "row 1 can't be read")
