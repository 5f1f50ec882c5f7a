"""The folder of a run: what it refuses, what it deletes, what it records."""

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from tests.helpers.configs import CONFIGS, composed
from train import config
from train.checkpoint import RunFolder, environment_record
from vzip import UserError


@pytest.fixture
def cfg(tmp_path):
    return OmegaConf.merge(composed(), {"runs": str(tmp_path), "name": "mine"})


def begin(cfg, digest="a"):
    run = RunFolder(cfg)
    run.begin({"hash": digest}, num_trainable=1, world_size=1)
    return run


@pytest.mark.parametrize("mode", ["RUN", "MULTIRUN"])
def test_a_run_of_a_sweep_records_the_command_of_itself(monkeypatch, mode):
    config.register()
    overrides = ["reducer.budget=4", "+exp=sweep-budget"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        job = compose("tune", overrides=[*overrides, f"hydra.mode={mode}"], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", job)
    monkeypatch.setattr(sys, "argv", ["train/tune.py", "+exp=sweep-budget"])

    alone = [*overrides, "hydra.mode=RUN"] if mode == "MULTIRUN" else ["+exp=sweep-budget"]
    assert environment_record(job, world_size=1)["command"] == ["train/tune.py", *alone]


def test_the_environment_has_versions_and_hardware(cfg):
    record = environment_record(cfg, world_size=2)
    assert list(record) == [
        "date",
        "commit",
        "modified_files",
        "command",
        "python",
        "packages",
        "hardware",
        "seed",
    ]
    assert {"torch", "transformers", "deepspeed"} <= set(record["packages"])
    assert record["hardware"]["world_size"] == 2 and record["hardware"]["device"]


def test_settings_are_written_completely_or_not_at_all(cfg, monkeypatch):
    run = begin(cfg)
    before = (run.path / "config.yaml").read_text()

    def cut(path, text):
        with path.open("w") as file:
            file.write(text[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        begin(cfg)
    assert (run.path / "config.yaml").read_text() == before


def test_a_disk_without_room_is_refused_before_training(cfg, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(50_000_000))
    with pytest.raises(UserError, match=r"50 MB free.*runs=\.\.\."):
        begin(cfg)


def test_other_settings_or_examples_are_refused(cfg):
    begin(cfg, "a" * 64)
    begin(cfg, "a" * 64)
    with pytest.raises(UserError, match=r"other settings \(optim.lr=0.002 there, 0.1 now\).*fresh=true"):
        RunFolder(OmegaConf.merge(cfg, {"optim": {"lr": 0.1}}))
    with pytest.raises(
        UserError, match=r"other examples \(hash aaaaaaaaaaaa, now bbbbbbbbbbbb\).*fresh=true"
    ):
        begin(cfg, "b" * 64)
    assert json.loads((RunFolder(cfg).path / "manifest.json").read_text())["hash"] == "a" * 64


def test_starting_over_deletes_a_run_where_it_begins_and_nothing_else(cfg, tmp_path):
    run = begin(cfg)
    run.finish([], num_steps=1, manifest={"hash": "a"})
    assert run.result == {"rows": [], "num_steps": 1, "manifest": "a", "seed": 0}

    fresh = OmegaConf.merge(cfg, {"fresh": True})
    over = RunFolder(fresh)
    assert over.result is None and (run.path / "result.json").is_file()
    begin(fresh, "b")
    assert not (run.path / "result.json").exists()
    assert json.loads((run.path / "manifest.json").read_text()) == {"hash": "b"}

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("It was")
    with pytest.raises(UserError, match=r"fresh=true: .*thesis exists and holds no run"):
        RunFolder(OmegaConf.merge(fresh, {"name": "thesis"}))
