"""A model's data from nothing: fetched from a server that misbehaves, killed, resumed, checked, cached, tuned on."""

import json
import signal
import subprocess
import sys
import time

import pytest

from data.paths import data_dir
from tests.conftest import ROOT
from tests.helpers import mix
from tests.helpers.commands import assert_same_metrics, environment, metrics, start, tune
from tests.helpers.server import Server, seeded

pytestmark = pytest.mark.integration

FAULTS = ("drop", "truncate", "short", "429", "503", "302", "404")


def script(name, *overrides):
    return [sys.executable, "-m", f"scripts.prepare.{name}", *overrides]


def run(name, *overrides):
    done = start(script(name, *overrides))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with a mix of 600 rows, as published."""
    folder = tmp_path_factory.mktemp("mix")
    mix.save_mix(folder, 600)
    return folder


@pytest.fixture(scope="module")
def settings(mine, overrides):
    """Of the tiny model on a tenth of the mix, whose addresses stand there no more."""
    ours = [item for item in overrides if not item.startswith(("data.", "optim.max_steps"))]
    data = [item for item in mix.settings("http://127.0.0.1:9", mine) if "pictures" not in item]
    return [*ours, *data, "data.num_workers=1", "optim.max_steps=3"]


def manifests():
    found = (data_dir() / "prepared").glob("mix-*/manifest.json")
    return [json.loads(path.read_text()) for path in sorted(found, key=lambda path: path.stat().st_mtime)]


@pytest.fixture(scope="module")
def fetched(mine, settings):
    """The manifest of the subset, fetched by a command that was killed and started again; and the server."""
    with Server(mine / "published", seeded(FAULTS, 0.2), delay_s=0.3) as server:
        command = script("fetch", "model=llava-7b", *mix.settings(server.url, mine))
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None and len(list((mine / "mine" / "images").rglob("*.jpg"))) < 10:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = {path: path.stat().st_mtime_ns for path in (mine / "mine" / "images").rglob("*.jpg")}
        assert 10 <= len(before) < 50 and not manifests(), "the command ended before the kill"
        done = start(command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {path: path.stat().st_mtime_ns for path in before} == before, "what had come was fetched again"
        yield manifests()[-1], server, done


def test_the_tenth_is_whole_though_links_are_dead(fetched, mine):
    manifest, _server, done = fetched
    total = sum(mix.COUNTS.values())
    assert manifest["num_rows_by_source"] == {
        source: -(-round(600 * count / total) // 10) for source, count in mix.COUNTS.items()
    }
    assert manifest["bad_rows"] and all(
        row["replaced"] and "404" in row["reason"] for row in manifest["bad_rows"]
    )
    assert manifest["hash"] in done.stdout and "left out" in done.stdout
    assert not [path for path in (mine / "mine").rglob(".*")]


def test_only_the_subset_was_fetched(fetched, mine):
    manifest, server, _ = fetched
    files = {
        path.relative_to(mine / "mine" / "images").as_posix()
        for path in (mine / "mine" / "images").rglob("*.jpg")
    }
    assert len(files) == manifest["num_rows"] - manifest["num_rows_by_source"]["text"]
    asked = {path.removeprefix("/moved") for path in server.requests if path.endswith(".jpg")}
    assert len(asked) <= len([name for name in files if name.startswith(("coco", "vg"))]) + len(
        manifest["bad_rows"]
    )


def test_a_quiet_server_gives_the_same_subset_but_for_the_dead_links(fetched, mine, tmp_path, monkeypatch):
    manifest, _, _ = fetched
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "vzip"))
    with Server(mine / "published") as server:
        here = [item.replace(f"{mine}/mine", f"{tmp_path}/mine") for item in mix.settings(server.url, mine)]
        run("fetch", "model=llava-7b", *here)
    (other,) = manifests()
    dead = {row["id"] for row in manifest["bad_rows"]}
    assert [name for name in other["ids"] if name not in dead] == [
        name for name in manifest["ids"] if name in other["ids"]
    ]
    assert not other["bad_rows"] and other["drawn_hash"] == manifest["drawn_hash"]


def test_the_check_prints_a_table_and_leaves_a_picture(fetched, settings):
    done = run("check", *settings)
    assert all(word in done.stdout for word in ("coco", "textvqa", "text tokens", "label", "p90"))
    (report,) = (data_dir() / "prepared").glob("mix-*/check.json")
    assert json.loads(report.read_text()) and report.with_suffix(".png").stat().st_size > 10_000


def test_features_of_a_cache_train_as_pictures_do(fetched, settings, tmp_path):
    here = [*settings, f"runs={tmp_path}"]
    tune([*here, "name=pictures"])
    early = start([sys.executable, "train/tune.py", *here, "name=early", "data.cache=true"])
    assert early.returncode == 2 and "make cache" in early.stderr and "Traceback" not in early.stderr
    done = run("cache", *settings)
    assert "data.cache=true" in done.stdout
    tune([*here, "name=cached", "data.cache=true"])
    assert_same_metrics(tmp_path / "cached", tmp_path / "pictures")


def test_questions_a_control_and_lora_beside_a_cache(fetched, settings, mine, tmp_path):
    """The control has another reducer, and no cache; questions need the towers; LoRA renames weights."""
    run("cache", *settings)
    rows = json.loads((mine / "mine" / "mix.json").read_text())
    known = [row for row in rows if row["id"] in fetched[0]["ids"] and "image" in row][:3]
    (tmp_path / "asked.json").write_text(json.dumps(known))
    here = [*settings, f"runs={tmp_path}", "data.cache=true", "optim.max_steps=1"]
    asked = [f"data.held_out={tmp_path}/asked.json", "evaluate.questions=2"]
    tune([*here, *asked, "name=asked", "control=true"])
    rows = json.loads((tmp_path / "asked" / "result.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full", "free", "tuned", "random"]
    for name, cache in (("lora", "true"), ("pictures", "false")):
        tune([*here, f"name={name}", "tune=language_lora", f"data.cache={cache}"])
    assert metrics(tmp_path / "lora")[0][1] == pytest.approx(metrics(tmp_path / "pictures")[0][1], rel=1e-5)


def test_a_wrong_address_ends_with_the_settings_name(mine, tmp_path):
    with Server(mine / "published") as server:
        wrong = [item for item in mix.settings(server.url, mine) if "image_folder" not in item]
        wrong += [
            f"data.image_folder={tmp_path}/images",
            f"data.pictures.coco=[{server.url}/nowhere/]",
            "data.fraction=0.9",
        ]
        done = start(script("fetch", "model=llava-7b", *wrong))
    assert (
        done.returncode == 2 and "data.fetch.pictures.coco" in done.stderr and "Traceback" not in done.stderr
    )


def test_an_address_without_the_file_is_said_in_a_line(mine, tmp_path):
    with Server(mine / "published") as server:
        address = f"data.address={server.url}/nowhere.json"
        done = start(script("fetch", "model=llava-7b", f"data.path={tmp_path}/mix.json", address))
    assert (
        done.returncode == 2
        and address in done.stderr
        and "404" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_loaders_benchmark_measures_what_it_says(tmp_path):
    short = [
        "--model",
        "llava",
        "--seconds",
        "0.1",
        "--rounds",
        "1",
        "--workers",
        "1",
        "--json",
        str(tmp_path / "found.json"),
    ]
    done = run("bench_loader", *short)
    assert "pictures/s, 1 worker" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())["llava"]
    assert found["rows"] == 66_529 and found["bytes_uint8"] == 3 * 336 * 336
    assert found["padding_ordered"] < found["padding_drawn"] and found["rates"]["1"][0] > 0
