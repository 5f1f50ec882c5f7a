"""From a data file to a subset: rows that can't be used are replaced, what was done is not done again, nothing is lost."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.examples.hf_folder import HfFolder
from data.examples.prepare import Selection, prepare
from data.fetch.http import Client
from data.fetch.sources import parse_source
from tests.helpers import tiny
from tests.helpers.broken import JSON, mutated, pictures
from vzip import UserError
from vzip.pictures import open_picture
from vzip.templates.encode import vicuna


@pytest.fixture(autouse=True)
def _own_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "vzip"))


def save_rows(folder, num_examples=200, *, without=()):
    """rows.json with rows of three sources, a third each, and pictures below images/, but those that are `without`."""
    rows = []
    for number in range(num_examples):
        source = ("coco", "vg", "text")[number % 3]
        turns = [{"from": "human", "value": f"what {number}?"}, {"from": "gpt", "value": "a cat"}]
        row = {"id": f"{source}-{number}", "conversations": turns}
        if source != "text":
            row["image"] = f"{source}/{number}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            path = folder / "images" / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if number not in without:
                tiny.picture(number, 10 + number % 7, 20).save(path)
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    return Selection(path=str(folder / "rows.json"), image_folder=str(folder / "images"), fraction=0.3)


def sources(folder):
    place = parse_source(str(folder), Client())
    return {"coco": [place], "vg": [place]}


def test_a_subset_is_its_manifest_its_rows_and_their_sizes(tmp_path):
    subset = prepare(save_rows(tmp_path))
    manifest = subset.manifest
    rows = list(subset.conversations())
    assert manifest["num_rows_by_source"] == {"coco": 21, "text": 20, "vg": 21} and manifest["num_rows"] == 62
    assert manifest["ids"] == [row.id for row in rows] and not manifest["bad_rows"]
    assert (manifest["fraction"], manifest["seed"], manifest["data"]["num_rows"]) == (0.3, 0, 200)
    assert json.loads((subset.folder / "manifest.json").read_text()) == manifest
    sizes = subset.sizes()
    assert {path for row in rows for path in row.images} == set(sizes)
    assert all(sizes[path] == (10 + int(Path(path).stem) % 7, 20) for path in sizes)


def test_a_prepared_subset_is_opened_without_a_look_at_the_pictures(tmp_path):
    selection = save_rows(tmp_path)
    first = prepare(selection)
    shutil.rmtree(tmp_path / "images")
    assert prepare(selection).manifest == first.manifest


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"fraction": 0.4}, {"sources": ("coco",)}, {"text_examples": False}]
)
def test_another_selection_is_another_subset(tmp_path, change):
    selection = save_rows(tmp_path)
    first, other = prepare(selection), prepare(Selection(**{**vars(selection), **change}))
    assert first.folder != other.folder and first.manifest["hash"] != other.manifest["hash"]


def test_the_same_rows_have_the_same_hash_in_any_order_and_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = save_rows(tmp_path / "a"), save_rows(tmp_path / "b")
    rows = json.loads(Path(second.path).read_text())
    Path(second.path).write_text(json.dumps(rows[::-1]))
    one, other = prepare(first).manifest, prepare(second).manifest
    assert (
        one["hash"] == other["hash"] and one["ids"] == other["ids"] and one["positions"] != other["positions"]
    )


def test_a_dead_picture_gives_its_place_to_another_row_of_its_source(tmp_path):
    selection = save_rows(tmp_path)
    published = tmp_path / "published"
    shutil.move(tmp_path / "images", published)
    drawn = prepare(Selection(**{**vars(selection), "image_folder": str(published)})).manifest["ids"]
    dead = [name for name in drawn if name.startswith("coco")][:5]
    for name in dead[:3]:
        (published / "coco" / f"{name.split('-')[1]}.png").unlink()
    for name in dead[3:]:
        (published / "coco" / f"{name.split('-')[1]}.png").write_bytes(b"<html>not found</html>")

    manifest = prepare(selection, sources=sources(published)).manifest
    assert manifest["num_rows_by_source"] == {"coco": 21, "text": 20, "vg": 21}
    assert {row["id"] for row in manifest["bad_rows"]} >= set(dead)
    assert all(row["replaced"] and row["source"] == "coco" for row in manifest["bad_rows"])
    assert not set(dead) & set(manifest["ids"])
    others = [name for name in manifest["ids"] if name in drawn]
    assert others == [name for name in drawn if name not in dead]  # nothing else moved


def test_a_source_without_more_rows_is_smaller(tmp_path):
    selection = Selection(**{**vars(save_rows(tmp_path, without=[0])), "fraction": 1.0})
    manifest = prepare(selection, sources=sources(tmp_path)).manifest
    (bad,) = manifest["bad_rows"]
    assert bad["id"] == "coco-0" and not bad["replaced"]
    assert manifest["num_rows"] == 199 and "coco-0" not in manifest["ids"]


def test_only_the_subsets_pictures_are_taken(tmp_path):
    selection = save_rows(tmp_path)
    shutil.move(tmp_path / "images", tmp_path / "published")
    subset = prepare(selection, sources=sources(tmp_path / "published"))
    taken = {
        path.relative_to(tmp_path / "images").as_posix() for path in (tmp_path / "images").rglob("*.png")
    }
    assert taken == {path for row in subset.conversations() for path in row.images}


def test_missing_pictures_are_refused_where_there_is_no_place_for_them(tmp_path):
    selection = save_rows(tmp_path)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError, match=r"42 of 62 examples can't be used \(coco: 21, vg: 21\)") as error:
        prepare(selection)
    assert "data.image_folder" in str(error.value) and "make data" in str(error.value)
    assert not list((tmp_path / "vzip").rglob("manifest.json"))


def test_too_many_bad_rows_in_the_file_are_refused(tmp_path):
    selection = save_rows(tmp_path)
    rows = json.loads(Path(selection.path).read_text())
    for row in rows[:5]:
        row["conversations"] = []
    Path(selection.path).write_text(json.dumps(rows))
    with pytest.raises(UserError, match="5 of 200 examples can't be used"):
        prepare(selection)


def test_a_read_only_picture_folder_will_do(tmp_path):
    selection = save_rows(tmp_path)
    folders = [tmp_path / "images", *(tmp_path / "images").iterdir()]
    for folder in folders:
        folder.chmod(0o555)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*")}
    try:
        assert prepare(selection).manifest["num_rows"] == 62
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*")} == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_examples_are_made_once_for_a_template(tmp_path):
    subset = prepare(save_rows(tmp_path))
    examples = subset.examples(vicuna(), tiny.tokenizer(), max_tokens=2048)
    made = examples.path.stat().st_mtime_ns
    assert subset.examples(vicuna(), tiny.tokenizer(), max_tokens=2048).path.stat().st_mtime_ns == made
    assert subset.examples(vicuna("Be kind. "), tiny.tokenizer(), max_tokens=2048).path != examples.path
    assert len(examples) == 62
    for example, row in zip(examples, subset.conversations(), strict=True):
        assert example.media.get("image", ()) == tuple(tmp_path / "images" / path for path in row.images)
        assert example.sizes == tuple(subset.sizes()[path] for path in row.images)


@pytest.fixture(scope="module")
def hf_rows():
    pictures = [tiny.picture(number, 12, 16) for number in range(4)]
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    two = [{"from": "human", "value": "<image><image>\nwhich?"}, {"from": "gpt", "value": "the first"}]
    text = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    return {
        "id": ["one", "two", "none"],
        "images": [[pictures[0]], [pictures[1], pictures[2]], []],
        "conversations": [turns, two, text],
    }


@pytest.mark.parametrize("form", ["saved", "saved with splits", "parquet", "one picture a row"])
def test_a_folder_of_datasets_with_pictures_inside_is_data(tmp_path, hf_rows, form):
    datasets = pytest.importorskip("datasets")
    if form == "one picture a row":
        rows = {name: [values[0], values[2]] for name, values in hf_rows.items() if name != "images"}
        data = datasets.Dataset.from_dict({**rows, "image": [hf_rows["images"][0][0], None]})
        data = data.cast_column("image", datasets.Image())
    else:
        data = datasets.Dataset.from_dict(hf_rows).cast_column("images", datasets.List(datasets.Image()))
    folder = tmp_path / "mine"
    if form == "parquet":
        folder.mkdir()
        data.to_parquet(folder / "train-0.parquet")
    else:
        (datasets.DatasetDict(train=data) if form == "saved with splits" else data).save_to_disk(folder)

    subset = prepare(Selection(path=str(folder), image_folder=str(tmp_path / "images")))
    rows = sorted(subset.conversations(), key=lambda row: -len(row.images))
    assert sorted(subset.manifest["ids"]) == sorted(data["id"])
    assert set(subset.manifest["num_rows_by_source"]) == {"mine", "text"}
    assert all(size == (12, 16) for size in subset.sizes().values())
    files = [tmp_path / "images" / path for path in rows[0].images]
    assert len(files) == (1 if form == "one picture a row" else 2) and all(file.is_file() for file in files)


def test_a_folder_of_datasets_without_conversations_is_refused(tmp_path, hf_rows):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"id": ["a"]}).save_to_disk(tmp_path / "mine")
    with pytest.raises(UserError, match=r"data\.path=.*no column 'conversations', only id"):
        HfFolder(tmp_path / "mine").dataset  # noqa: B018


@settings(max_examples=15, deadline=None)
@given(
    entries=st.lists(mutated() | JSON, max_size=3),
    files=st.dictionaries(st.integers(0, 199).filter(lambda number: number % 3 < 2), pictures(), max_size=2),
    lines=st.booleans(),
)
def test_whatever_rows_and_files_hold_the_good_ones_survive(tmp_path_factory, entries, files, lines):
    folder = tmp_path_factory.mktemp("broken")
    selection = Selection(**{**vars(save_rows(folder)), "fraction": 1.0})
    rows = json.loads(Path(selection.path).read_text())
    good = {row["id"] for number, row in enumerate(rows) if number not in files}
    for number, content in files.items():
        (folder / "images" / rows[number]["image"]).write_bytes(content)
    rows[100:100] = entries
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    Path(selection.path).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VZIP_DATA", str(folder / "vzip"))
        try:
            manifest = prepare(selection).manifest
        except UserError as error:
            assert "examples can't be used" in str(error) and str(error).count("\n") < 12
            return
    assert good <= set(manifest["ids"])
    assert manifest["num_rows"] + len(manifest["bad_rows"]) == len(rows)
    assert all(row["reason"] for row in manifest["bad_rows"])


def test_making_it_again_brings_back_what_is_missing(tmp_path):
    selection = save_rows(tmp_path)
    shutil.move(tmp_path / "images", tmp_path / "published")
    subset = prepare(selection, sources=sources(tmp_path / "published"))
    path = next(path for row in subset.conversations() for path in row.images)
    (tmp_path / "images" / path).unlink()
    assert prepare(selection, sources=sources(tmp_path / "published")).manifest == subset.manifest
    assert (tmp_path / "images" / path).is_file()


def saved(folder, colours, **columns):
    """A `datasets` folder of one-coloured pictures, always of the same name."""
    datasets = pytest.importorskip("datasets")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a colour"}]
    rows = {
        "image": [Image.new("RGB", (8, 8), colour) for colour in colours],
        "conversations": [turns] * len(colours),
    }
    data = datasets.Dataset.from_dict(
        rows | {name: [value] * len(colours) for name, value in columns.items()}
    )
    data.cast_column("image", datasets.Image()).save_to_disk(folder / "train")
    return Selection(path=str(folder / "train"), image_folder=str(folder.parent / "images"))


def test_pictures_of_folders_of_the_same_name_are_kept_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = prepare(saved(tmp_path / "a", ["red"])), prepare(saved(tmp_path / "b", ["blue"]))
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    third = prepare(saved(tmp_path / "a", ["lime"]))
    for subset, colour in ((first, (255, 0, 0)), (second, (0, 0, 255)), (third, (0, 255, 0))):
        (row,) = subset.conversations()
        assert open_picture(tmp_path / "images" / row.images[0]).getpixel((0, 0)) == colour
    assert len({subset.manifest["hash"] for subset in (first, second, third)}) == 3


def test_a_read_only_folder_of_datasets_with_columns_of_its_own_will_do(tmp_path):
    (tmp_path / "a").mkdir()
    selection = saved(tmp_path / "a", ["red", "blue"], made=datetime(2026, 1, 1), score=float("nan"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    assert prepare(selection).manifest["num_rows"] == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == before


def test_pictures_that_were_replaced_give_other_arrays(tmp_path):
    selection = save_rows(tmp_path)
    before = prepare(selection, sources={})
    path = next(path for row in before.conversations() for path in row.images)
    tiny.picture(99, 30, 50).save(tmp_path / "images" / path)
    after = prepare(selection, sources={})
    arrays = [subset.examples(vicuna(), tiny.tokenizer(), max_tokens=2048) for subset in (before, after)]
    assert before.manifest["hash"] == after.manifest["hash"] and arrays[0].path != arrays[1].path
    assert (30, 50) in {size for example in arrays[1] for size in example.sizes}


def test_pictures_in_no_folder_are_one_source(tmp_path):
    selection = save_rows(tmp_path)
    rows = [row for row in json.loads(Path(selection.path).read_text()) if "image" in row]
    for number, row in enumerate(rows):
        shutil.copy(tmp_path / "images" / row["image"], tmp_path / "images" / f"{number}.png")
        row["image"] = f"./{number}.png"
    Path(selection.path).write_text(json.dumps(rows))
    subset = prepare(selection)
    assert subset.manifest["num_rows_by_source"] == {"files": -(-3 * len(rows) // 10)}
    assert all(example.sizes for example in subset.examples(vicuna(), tiny.tokenizer(), max_tokens=2048))


def test_a_place_that_has_not_got_a_source_is_refused(tmp_path):
    selection = save_rows(tmp_path, 90)
    shutil.rmtree(tmp_path / "images" / "vg")
    (tmp_path / "empty").mkdir()
    nowhere = parse_source(str(tmp_path / "empty"), Client())
    with pytest.raises(UserError, match=r"of vg only 0 of 9 examples can be used; check data\.pictures\.vg"):
        prepare(selection, sources={"vg": [nowhere]})


def test_few_faults_are_not_many_because_few_rows_are_left_to_draw(tmp_path):
    """One bad row in the whole subset, met again while rows are replaced, is still one."""
    selection = save_rows(tmp_path, 600)
    drawn = [name for name in prepare(selection).manifest["ids"] if name.startswith("coco")]
    shutil.rmtree(tmp_path / "vzip")
    (tmp_path / "images" / "coco" / f"{drawn[0].split('-')[1]}.png").unlink()
    manifest = prepare(selection).manifest
    assert [row["id"] for row in manifest["bad_rows"]] == [drawn[0]] and manifest["num_rows"] == 180


def test_a_lost_ledger_is_said_and_made_again(tmp_path):
    selection = save_rows(tmp_path)
    subset = prepare(selection)
    (subset.folder / "checked.jsonl").unlink()
    with pytest.raises(UserError, match=r"nothing is recorded about .*run `make data` again"):
        subset.examples(vicuna(), tiny.tokenizer(), max_tokens=2048)
    assert len(prepare(selection, sources={}).examples(vicuna(), tiny.tokenizer(), max_tokens=2048)) == 62


def test_paths_in_a_folder_of_datasets_are_files_beside_it_or_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a colour"}]
    data = datasets.Dataset.from_dict({"image": ["red.png"] * 2, "conversations": [turns] * 2})
    data.save_to_disk(tmp_path / "mine")
    selection = Selection(path=str(tmp_path / "mine"), image_folder=str(tmp_path / "images"))
    with pytest.raises(UserError, match="of mine only 0 of 2 examples can be used"):
        prepare(selection)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "mine" / "red.png")
    assert prepare(selection).manifest["ids"] in (["0", "1"], ["1", "0"])
