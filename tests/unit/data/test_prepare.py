"""From a data file to a subset: unusable examples are replaced, finished work is not done again,
nothing is lost.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.examples.prepare import Selection, prepare
from data.examples.unchanged import check_media_unchanged
from data.fetch.http import TransientError
from data.fetch.sources import Folder
from data.paths import data_dir
from tests.helpers import tiny
from tests.helpers.broken import JSON, messages, mutated, pictures
from tests.helpers.commands import begin
from vzip import UserError
from vzip.templates.encode import vicuna

pytestmark = pytest.mark.slow


def save_examples(folder, num_examples=200):
    """Write examples.json with three sources, a third each, and their pictures below images/. Returns
    a selection.
    """
    entries = []
    for number in range(num_examples):
        source = ("coco", "vg", "text")[number % 3]
        entry = {"id": f"{source}-{number}", "conversations": messages(f"what {number}?", "a cat")}
        if source != "text":
            entry["image"] = f"{source}/{number}.png"
            entry["conversations"] = messages(f"<image>\nwhat {number}?", "a cat")
            path = folder / "images" / entry["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            tiny.picture(number, 10 + number % 7, 20).save(path)
        entries.append(entry)

    path = folder / "examples.json"
    path.write_text(json.dumps(entries))
    return Selection(path=str(path), image_folder=str(folder / "images"), fraction=0.3)


def edit(selection, change):
    """Change the list of entries in a selection's file."""
    path = Path(selection.path)
    entries = json.loads(path.read_text())
    path.write_text(json.dumps(change(entries)))


def publish(folder):
    """Move the pictures to another folder. Returns it, and the sources that take them from there."""
    published = folder / "published"
    shutil.move(folder / "images", published)
    return published, sources_in(published)


def sources_in(folder):
    return {"coco": [Folder(str(folder))], "vg": [Folder(str(folder))]}


def picture_of(folder, name):
    """The picture of an example by its id."""
    source, number = name.split("-")
    return folder / source / f"{number}.png"


def examples_of(subset, template=None):
    return subset.examples(template or vicuna(), tiny.tokenizer(), max_tokens=2048)


def test_a_subset_is_its_manifest_its_examples_and_their_sizes(tmp_path):
    selection = save_examples(tmp_path)
    images = tmp_path / "images"
    before = {path: path.stat().st_mtime_ns for path in images.rglob("*")}
    subset = prepare(selection)
    assert {path: path.stat().st_mtime_ns for path in images.rglob("*")} == before

    manifest = subset.manifest
    assert manifest["num_rows_by_source"] == {"coco": 21, "text": 20, "vg": 21}
    assert manifest["num_rows"] == 62
    assert not manifest["bad_rows"]
    assert (manifest["fraction"], manifest["seed"], manifest["data"]["num_rows"]) == (0.3, 0, 200)
    assert json.loads((subset.folder / "manifest.json").read_text()) == manifest

    conversations = list(subset.conversations())
    assert [conversation.id for conversation in conversations] == manifest["ids"]
    sizes = subset.sizes()
    assert {path for conversation in conversations for path in conversation.images} == set(sizes)
    assert all(size == (10 + int(Path(path).stem) % 7, 20) for path, size in sizes.items())

    # It is opened again without a look at the pictures, and another selection is another subset.
    changes = [{"seed": 1}, {"fraction": 0.4}, {"sources": ("coco",)}, {"text_examples": False}]
    others = [prepare(replace(selection, **change)) for change in changes]
    shutil.rmtree(images)
    assert prepare(selection).manifest == manifest
    assert len({other.folder for other in [subset, *others]}) == 5
    assert len({other.manifest["hash"] for other in [subset, *others]}) == 5


def test_the_same_examples_have_the_same_hash_in_any_order_and_folder(tmp_path):
    manifests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        selection = save_examples(tmp_path / name)
        if name == "b":
            edit(selection, lambda entries: entries[::-1])
        manifests.append(prepare(selection).manifest)

    first, second = manifests
    assert first["hash"] == second["hash"]
    assert first["ids"] == second["ids"]
    assert first["positions"] != second["positions"]


def test_a_dead_picture_is_replaced_by_another_example_of_its_source(tmp_path):
    selection = save_examples(tmp_path)
    drawn = prepare(selection).manifest["ids"]
    published, sources = publish(tmp_path)
    dead = [name for name in drawn if name.startswith("coco")][:2]
    picture_of(published, dead[0]).unlink()
    picture_of(published, dead[1]).write_bytes(b"<html>not found</html>")

    manifest = prepare(selection, sources=sources).manifest
    assert manifest["num_rows_by_source"] == {"coco": 21, "text": 20, "vg": 21}
    assert {example["id"] for example in manifest["bad_rows"]} >= set(dead)
    assert all(example["replaced"] and example["source"] == "coco" for example in manifest["bad_rows"])

    # Nothing else has moved.
    assert not set(dead) & set(manifest["ids"])
    stayed = [name for name in manifest["ids"] if name in drawn]
    assert stayed == [name for name in drawn if name not in dead]

    # A source without more examples becomes smaller.
    picture_of(published, dead[1]).unlink()
    shutil.rmtree(tmp_path / "images")
    manifest = prepare(replace(selection, fraction=1.0), sources=sources).manifest
    assert {example["id"]: example["replaced"] for example in manifest["bad_rows"]} == dict.fromkeys(
        dead, False
    )
    assert manifest["num_rows"] == 198 and not set(dead) & set(manifest["ids"])


def test_too_many_faults_are_refused_with_where_to_look(tmp_path):
    selection = save_examples(tmp_path, 90)
    images = tmp_path / "images"
    images.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"18 of 27 examples can't be used \(coco: 9, vg: 9\)") as error:
        prepare(selection)
    words = ["data.image_folder", "make data", "coco-", "png: missing"]
    assert [word for word in words if word not in str(error.value)] == []
    assert str(error.value).count("missing") >= 5

    (tmp_path / "elsewhere").rename(images)
    shutil.rmtree(images / "vg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"only 0 of 9 examples of vg can be used; check data\.pictures\.vg"):
        prepare(selection, sources={"vg": [Folder(str(tmp_path / "empty"))]})

    edit(selection, lambda entries: [entry | {"conversations": []} for entry in entries[:5]] + entries[5:])
    with pytest.raises(UserError, match="5 of 90 examples can't be used"):
        prepare(selection)
    assert not list((tmp_path / "vzip").rglob("manifest.json"))


def test_servers_that_do_not_answer_are_refused_or_replaced(tmp_path):
    class Slow(Folder):
        def read(self, path):
            if path == slow:
                raise TransientError(f"{path}: answered 503")
            return super().read(path)

    selection = save_examples(tmp_path)
    name = next(name for name in prepare(selection).manifest["ids"] if name.startswith("vg"))
    published, _ = publish(tmp_path)
    slow = picture_of(published, name).relative_to(published).as_posix()
    sources = {source: [Slow(str(published))] for source in ("coco", "vg")}
    with pytest.raises(
        UserError, match=rf"(?s)1 pictures could not .*replace_unreachable=true.*{slow}: answered 503"
    ):
        prepare(selection, sources=sources)

    manifest = prepare(selection, sources=sources, replace_unreachable=True).manifest
    assert [example["id"] for example in manifest["bad_rows"]] == [name]
    assert manifest["num_rows"] == 62


def test_few_faults_are_not_many_because_few_examples_are_left_to_draw(tmp_path):
    """One bad example in the whole subset is still one when it is met again while examples are replaced."""
    selection = save_examples(tmp_path, 600)
    drawn = [name for name in prepare(selection).manifest["ids"] if name.startswith("coco")]
    shutil.rmtree(tmp_path / "vzip")
    picture_of(tmp_path / "images", drawn[0]).unlink()

    manifest = prepare(selection).manifest
    assert [example["id"] for example in manifest["bad_rows"]] == [drawn[0]]
    assert manifest["num_rows"] == 180


def test_examples_are_made_once_for_a_template_and_for_the_pictures(tmp_path, monkeypatch):
    selection = save_examples(tmp_path)
    subset = prepare(selection, sources={})
    examples = examples_of(subset)
    assert len(examples) == 62
    for example, conversation in zip(examples, subset.conversations(), strict=True):
        paths = tuple(tmp_path / "images" / path for path in conversation.images)
        assert example.media.get("image", ()) == paths
        assert example.sizes == tuple(subset.sizes()[path] for path in conversation.images)

    # They are opened without a lock: in a read-only folder, none can be made.
    written = examples.path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("data.examples.prepare.locked", None)
        patch.setattr("data.examples.table.locked", None)
        assert examples_of(prepare(selection)).path.stat().st_mtime_ns == written
    assert examples_of(subset, vicuna("Be kind. ")).path != examples.path

    # Other pictures in the old ones' place have other sizes.
    path = next(conversation.images[0] for conversation in subset.conversations() if conversation.images)
    tiny.picture(99, 30, 50).save(tmp_path / "images" / path)
    again = prepare(selection, sources={})
    assert again.manifest["hash"] == subset.manifest["hash"]
    assert examples_of(again).path != examples.path
    assert (30, 50) in {size for example in examples_of(again) for size in example.sizes}

    # A lost media index is named and made again.
    (again.folder / "checked.jsonl").unlink()
    with pytest.raises(UserError, match=r"nothing is recorded about .*run `make data` again"):
        examples_of(again, vicuna("Be brief. "))
    assert len(examples_of(prepare(selection, sources={}), vicuna("Be brief. "))) == 62


@settings(max_examples=20, deadline=None)
@given(
    entries=st.lists(mutated() | JSON, max_size=3),
    files=st.dictionaries(st.integers(0, 199).filter(lambda number: number % 3 < 2), pictures(), max_size=2),
    is_lines=st.booleans(),
)
def test_whatever_examples_and_files_hold_the_good_ones_survive(tmp_path_factory, entries, files, is_lines):
    folder = tmp_path_factory.mktemp("broken")
    selection = replace(save_examples(folder), fraction=1.0)
    all_entries = json.loads(Path(selection.path).read_text())
    good = {entry["id"] for number, entry in enumerate(all_entries) if number not in files}
    for number, content in files.items():
        (folder / "images" / all_entries[number]["image"]).write_bytes(content)
    all_entries[100:100] = entries
    text = "\n".join(map(json.dumps, all_entries)) if is_lines else json.dumps(all_entries)
    Path(selection.path).write_text(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VZIP_DATA", str(folder / "vzip"))
        try:
            manifest = prepare(selection).manifest
        except UserError as error:
            assert "examples can't be used" in str(error)
            assert str(error).count("\n") < 12
            return

    assert good <= set(manifest["ids"])
    assert manifest["num_rows"] + len(manifest["bad_rows"]) == len(all_entries)
    assert all(example["reason"] for example in manifest["bad_rows"])


DAMAGED_MANIFESTS = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a list": lambda content: b"[]",
    "no entries": lambda content: b"{}",
    "other examples": lambda content: content.replace(b'"positions": [', b'"positions": [987654,'),
}


@pytest.mark.parametrize("damage", DAMAGED_MANIFESTS)
def test_a_damaged_manifest_is_refused_with_the_cure(tmp_path, damage):
    selection = save_examples(tmp_path, 12)
    manifest = prepare(selection).folder / "manifest.json"
    manifest.write_bytes(DAMAGED_MANIFESTS[damage](manifest.read_bytes()))
    with pytest.raises(UserError, match=r"manifest\.json is damaged.*delete its folder.*makes it anew"):
        prepare(selection)


# Pictures that change after the subset was made


def test_pictures_that_changed_are_named_before_a_run_goes_on(tmp_path):
    selection = save_examples(tmp_path, 40)
    subset = prepare(selection)
    shown = {path for conversation in subset.conversations() for path in conversation.images}
    assert sorted(subset.media_paths()) == sorted(shown)
    for path in (tmp_path / "images").rglob("*.png"):
        if path.relative_to(tmp_path / "images").as_posix() not in shown:
            path.unlink()
    check_media_unchanged(subset)

    # The first keeps its size in bytes.
    of_same_size, replaced, gone = (tmp_path / "images" / path for path in subset.media_paths()[:3])
    content = of_same_size.read_bytes()
    of_same_size.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    replaced.write_bytes(content + content)
    gone.unlink()
    with pytest.raises(UserError) as error:
        check_media_unchanged(subset)
    message = str(error.value)
    assert f"3 of {len(subset.media_paths())} pictures or videos in" in message
    assert f"{of_same_size.parent.name}/{of_same_size.name}: it has another content" in message
    assert message.count("another size") == 2
    assert f"delete {subset.folder}" in message

    # The message's advice helps.
    of_same_size.write_bytes(content)
    gone.write_bytes(content)
    shutil.rmtree(subset.folder)
    check_media_unchanged(prepare(selection))


def test_videos_that_changed_are_named(tmp_path):
    path = tiny.save_mixed_data(tmp_path, "onevision")
    subset = prepare(Selection(path=str(path), image_folder=str(tmp_path / "images")))
    check_media_unchanged(subset)

    (tmp_path / "images" / "clips" / "3" / "0.png").unlink()
    with pytest.raises(UserError, match="1 of 14 pictures or videos in"):
        check_media_unchanged(subset)


# Several processes


def container():
    """Words before a command that give it numbers of processes of its own, as a container does. None
    where nobody may do that.
    """
    words = ["unshare", "--pid", "--fork", "--mount-proc"]
    may = shutil.which("unshare") and not subprocess.run([*words, "true"], check=False).returncode
    return words if may else []


@pytest.mark.integration
def test_containers_that_prepare_one_subset_at_once_make_it_once(tmp_path):
    selection = save_examples(tmp_path, 40)
    code = (
        "import sys\n"
        "from data.examples.prepare import Selection, prepare\n"
        "subset = prepare(Selection(path=sys.argv[1], image_folder=sys.argv[2]))\n"
        "print(subset.manifest['hash'])\n"
    )
    command = [*container(), sys.executable, "-c", code, selection.path, selection.image_folder]
    running = [begin(command) for _ in range(2)]
    printed = {process.communicate()[0].splitlines()[-1] for process in running}
    assert len(printed) == 1 and [process.returncode for process in running] == [0, 0]
    assert len(list((data_dir() / "tables").glob("examples-*.arrow"))) == 1

    # Each picture was looked at once.
    (index,) = (data_dir() / "prepared").glob("examples-*/checked.jsonl")
    lines = index.read_text().splitlines()
    assert len(lines) == len({json.loads(line)["path"] for line in lines})
