"""A model's data from nothing: fetched from a server that misbehaves, killed, resumed, checked,
cached, tuned on.
"""

import json
import sys
import time

import pytest

from data.paths import data_dir
from tests.helpers import mix
from tests.helpers.commands import assert_same_metrics, begin, metrics, start, tune
from tests.helpers.server import Server, seeded

pytestmark = pytest.mark.integration

FAULTS = ("drop", "truncate", "short", "429", "503", "302", "404")
NUM_EXAMPLES = 600


def module(name, *arguments):
    return [sys.executable, "-m", f"scripts.{name}", *arguments]


def run(name, *arguments):
    done = start(module(name, *arguments))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def assert_refused(done, *words):
    """The command ended with exit code 2 and a message that holds the words, and no traceback."""
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a mix as published in published/; mine/ is the user's."""
    folder = tmp_path_factory.mktemp("mix")
    mix.save_mix(folder, NUM_EXAMPLES)
    return folder


@pytest.fixture(scope="module")
def settings(folder, overrides):
    """The tiny model on a tenth of the mix, without the addresses it was fetched from."""
    of_model = [item for item in overrides if not item.startswith(("data.", "optim.max_steps"))]
    of_data = [item for item in mix.settings("http://127.0.0.1:9", folder) if "pictures" not in item]
    return [*of_model, *of_data, "data.num_workers=1", "optim.max_steps=3"]


def jpegs(folder):
    return list((folder / "mine" / "images").rglob("*.jpg"))


def manifests():
    """The manifests of all subsets, the newest one last."""
    paths = (data_dir() / "prepared").glob("mix-*/manifest.json")
    in_order = sorted(paths, key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in in_order]


@pytest.fixture(scope="module")
def fetched(folder, settings):
    """(manifest, server, last command) of a subset whose first command was killed, and which a second
    one resumed.
    """
    with Server(folder / "published", seeded(FAULTS, 0.2), delay_s=0.3) as server:
        command = module("prepare.fetch", "model=llava-7b", *mix.settings(server.url, folder))
        process = begin(command)
        while process.poll() is None and len(jpegs(folder)) < 10:
            time.sleep(0.01)
        process.kill()
        process.communicate()

        before = {path: path.stat().st_mtime_ns for path in jpegs(folder)}
        assert 10 <= len(before) < 50 and not manifests(), "the command ended before the kill"
        done = start(command)
        assert done.returncode == 0, done.stderr[-3000:]
        for path, modified in before.items():
            assert path.stat().st_mtime_ns == modified, "a picture was fetched again"
        yield manifests()[-1], server, done


def test_the_tenth_is_whole_though_links_are_dead_and_nothing_else_was_fetched(fetched, folder):
    manifest, server, done = fetched
    total = sum(mix.COUNTS.values())
    expected = {}
    for source, count in mix.COUNTS.items():
        num_published = round(NUM_EXAMPLES * count / total)
        expected[source] = -(-num_published // 10)  # a tenth, rounded up
    assert manifest["num_rows_by_source"] == expected

    assert manifest["bad_rows"]
    for example in manifest["bad_rows"]:
        assert example["replaced"]
        assert "404" in example["reason"]
    assert manifest["hash"] in done.stdout
    assert "left out" in done.stdout
    assert not list((folder / "mine").rglob("*.vzip-tmp"))

    names = {path.relative_to(folder / "mine" / "images").as_posix() for path in jpegs(folder)}
    assert len(names) == manifest["num_rows"] - manifest["num_rows_by_source"]["text"]

    # Pictures of other sources come out of zip files.
    from_addresses = [name for name in names if name.startswith(("coco", "vg"))]
    asked = {path.removeprefix("/moved") for path in server.requests if path.endswith(".jpg")}
    assert len(asked) <= len(from_addresses) + len(manifest["bad_rows"])


def test_a_quiet_server_gives_the_same_subset_but_for_the_dead_links(fetched, folder, tmp_path, monkeypatch):
    manifest, _, _ = fetched
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "vzip"))
    with Server(folder / "published") as server:
        overrides = mix.settings(server.url, folder)
        here = [item.replace(f"{folder}/mine", f"{tmp_path}/mine") for item in overrides]
        run("prepare.fetch", "model=llava-7b", *here)

    (other,) = manifests()
    assert not other["bad_rows"]
    assert other["drawn_hash"] == manifest["drawn_hash"]
    dead = {example["id"] for example in manifest["bad_rows"]}
    of_both = [name for name in manifest["ids"] if name in other["ids"]]
    assert [name for name in other["ids"] if name not in dead] == of_both


def test_the_check_prints_a_table_and_leaves_a_picture(fetched, settings):
    done = run("prepare.check", *settings)
    for word in ("coco", "textvqa", "text tokens", "label", "p90"):
        assert word in done.stdout

    (report,) = (data_dir() / "prepared").glob("mix-*/check.json")
    assert json.loads(report.read_text())
    assert report.with_suffix(".png").stat().st_size > 10_000


def test_features_of_a_cache_train_as_pictures_do(fetched, settings, tmp_path):
    here = [*settings, f"runs={tmp_path}"]
    tune([*here, "name=pictures"])
    early = start([sys.executable, "train/tune.py", *here, "name=early", "data.cache=true"])
    assert_refused(early, "make cache")

    done = run("prepare.cache", *settings)
    assert "data.cache=true" in done.stdout
    tune([*here, "name=cached", "data.cache=true"])
    assert_same_metrics(tmp_path / "cached", tmp_path / "pictures")


def test_questions_a_control_and_lora_beside_a_cache(fetched, settings, folder, tmp_path):
    """The control has another reducer, and no cache; questions need the towers; LoRA renames weights."""
    run("prepare.cache", *settings)
    entries = json.loads((folder / "mine" / "mix.json").read_text())
    in_subset = [entry for entry in entries if entry["id"] in fetched[0]["ids"] and "image" in entry]
    (tmp_path / "asked.json").write_text(json.dumps(in_subset[:3]))

    here = [*settings, f"runs={tmp_path}", "data.cache=true", "optim.max_steps=1"]
    questions = [f"data.held_out={tmp_path}/asked.json", "evaluate.questions=2"]
    tune([*here, *questions, "name=asked", "control=true"])
    rows = json.loads((tmp_path / "asked" / "result.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full", "free", "tuned", "random"]

    losses = []
    for name, cache in (("lora", "true"), ("pictures", "false")):
        tune([*here, f"name={name}", "tune=language_lora", f"data.cache={cache}"])
        _, loss, _ = metrics(tmp_path / name)[0]
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_wrong_addresses_are_named(folder, tmp_path):
    with Server(folder / "published") as server:
        overrides = [item for item in mix.settings(server.url, folder) if "image_folder" not in item]
        overrides += [
            f"data.image_folder={tmp_path}/images",
            f"data.pictures.coco=[{server.url}/nowhere/]",
            "data.fraction=0.9",
        ]
        of_pictures = start(module("prepare.fetch", "model=llava-7b", *overrides))

        address = f"data.address={server.url}/nowhere.json"
        overrides = [f"data.path={tmp_path}/mix.json", address]
        of_instructions = start(module("prepare.fetch", "model=llava-7b", *overrides))

    assert_refused(of_pictures, "data.pictures.coco")
    assert_refused(of_instructions, address, "404", f"data.path={tmp_path}/mix.json")
