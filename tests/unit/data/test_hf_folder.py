"""Folders of Hugging Face `datasets` with the pictures inside are data like any other."""

import shutil
from datetime import datetime

import pytest
from PIL import Image

from data.examples.hf_folder import HfFolder
from data.examples.prepare import Selection, prepare
from tests.helpers import tiny
from tests.helpers.broken import messages
from vzip import UserError
from vzip.pictures import open_picture

datasets = pytest.importorskip("datasets")

ONE_PICTURE = messages("<image>\nwhat?", "a colour")


def select(folder):
    return Selection(path=str(folder), image_folder=str(folder.parent / "images"))


def save_colours(folder, colours, **columns):
    """A `datasets` folder of one-coloured pictures, always named train."""
    columns = {name: [value] * len(colours) for name, value in columns.items()}
    columns["image"] = [Image.new("RGB", (8, 8), colour) for colour in colours]
    columns["conversations"] = [ONE_PICTURE] * len(colours)
    folder.mkdir(exist_ok=True)
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
    data = datasets.Dataset.from_dict({"image": ["red.png"] * 2, "conversations": [ONE_PICTURE] * 2})
    data.save_to_disk(tmp_path / "mine")
    with pytest.raises(UserError, match="only 0 of 2 examples of mine can be used"):
        prepare(select(tmp_path / "mine"))

    Image.new("RGB", (8, 8), "red").save(tmp_path / "mine" / "red.png")
    assert sorted(prepare(select(tmp_path / "mine")).manifest["ids"]) == ["0", "1"]
