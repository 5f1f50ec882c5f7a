"""The folder of a run: what it refuses, what it deletes, what it records."""

import errno
import json
import os
import resource
import shutil
import sys
from collections import namedtuple
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from tests.helpers.configs import CONFIGS, composed
from train import config
from train.checkpoint import RunFolder, environment_record, locked_run
from train.evaluation.evaluator import AnswerFiles
from train.state import PARTS
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
    names = "date commit modified_files command python packages hardware seed"
    assert list(record) == names.split()
    assert {"torch", "transformers", "deepspeed"} <= set(record["packages"])
    assert record["hardware"]["world_size"] == 2 and record["hardware"]["device"]


def test_a_disk_without_room_is_refused_before_training(cfg, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(50_000_000))
    with pytest.raises(UserError, match=r"50 MB free.*runs=\.\.\."):
        begin(cfg)


def test_other_settings_or_examples_are_refused(cfg):
    begin(cfg, "a" * 64)
    begin(cfg, "a" * 64)
    with pytest.raises(UserError, match=r"other settings \(optim.lr=0.002 there, 0.1 now\).*fresh=true"):
        RunFolder(OmegaConf.merge(cfg, {"optim": {"lr": 0.1}}))
    words = r"other examples \(hash aaaaaaaaaaaa, now bbbbbbbbbbbb\).*fresh=true"
    with pytest.raises(UserError, match=words):
        begin(cfg, "b" * 64)
    with pytest.raises(UserError, match=r"begun on other pictures \(hash None, now b\)"):
        RunFolder(cfg).begin({"hash": "a" * 64, "media_hash": "b"}, num_trainable=1, world_size=1)
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


def test_a_finished_run_is_kept_until_the_new_one_is_finished(cfg, capsys):
    run = begin(cfg)
    run.finish([], num_steps=7, manifest={"hash": "a"})
    kept = run.path.with_name("mine.before-fresh")

    # The first new run fails, and so does the second: the finished one is still there.
    fresh = OmegaConf.merge(cfg, {"fresh": True, "optim": {"lr": 0.1}})
    for digest in ("b", "c"):
        begin(fresh, digest)
        assert json.loads((kept / "result.json").read_text())["num_steps"] == 7
        assert json.loads((run.path / "manifest.json").read_text()) == {"hash": digest}
    assert capsys.readouterr().out.splitlines() == [
        f"the finished run is kept as {kept} until the new one is finished"
    ]

    # The third is stopped, and goes on without fresh=true.
    begin(OmegaConf.merge(fresh, {"fresh": False}), "c").finish([], num_steps=9, manifest={"hash": "c"})
    assert not kept.exists()
    assert json.loads((run.path / "result.json").read_text())["num_steps"] == 9


# Two processes


def test_a_second_process_is_told_who_holds_the_run(cfg, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    others = [{}, {"fresh": True}, {"runs": f"{tmp_path}/link/../{tmp_path.name}"}]
    with locked_run(cfg) as run:
        run.begin({"hash": "a"}, num_trainable=1, world_size=1)
        for changes in others:
            busy = rf"mine is being written by process {os.getpid()} on .*; wait until it ends, or stop it"
            with pytest.raises(UserError, match=busy), locked_run(OmegaConf.merge(cfg, changes)):
                pass

        # Another run is free, and so is reading this one.
        with locked_run(OmegaConf.merge(cfg, {"name": "other"})):
            assert RunFolder(cfg).result is None
        assert (run.path / "config.yaml").is_file()

    with locked_run(OmegaConf.merge(cfg, {"fresh": True})) as run:
        run.begin({"hash": "b"}, num_trainable=1, world_size=1)


@pytest.mark.parametrize("runs", ["/dev/null", "/dev/null/runs", "/proc/vzip"])
def test_a_folder_that_cannot_be_written_is_refused(cfg, runs):
    unwritable = OmegaConf.merge(cfg, {"runs": runs})
    with pytest.raises(UserError, match=rf"{runs} can't be written .*set runs="), locked_run(unwritable):
        pass


# Damage

CONTENTS = (
    *(b"", b'{"rows": [', b'seed: "0', b"[]", b"hello", b"\xff\xfe\x00", b"[" * 20_000, bytes(100)),
    b'{"data": 5, "rows": [1], "hash": null}',
    bytes(range(256)),
)
"""What is left of a file."""


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "result.json", "answers_full.json"])
def test_a_damaged_file_is_named_with_what_to_do(cfg, name):
    for content in CONTENTS:
        run = begin(cfg)
        (run.path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"restore|begun on other examples|other settings") as refused:
            again = RunFolder(cfg)
            assert again.result is None
            AnswerFiles(again.path).load("full")
            begin(cfg)
        assert str(run.path) in str(refused.value)

        # Starting over is always possible.
        begin(OmegaConf.merge(cfg, {"fresh": True}))


def test_what_is_no_folder_is_refused(cfg, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("")
    with pytest.raises(UserError, match="mine is no folder; choose another name"):
        RunFolder(cfg)
    mine.unlink()
    mine.symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="mine is no folder; choose another name"):
        RunFolder(cfg)

    # A link to a run is fine, but starting over would replace the link.
    begin(OmegaConf.merge(cfg, {"name": "real"}))
    mine.unlink()
    mine.symlink_to(tmp_path / "real")
    begin(cfg)
    with pytest.raises(UserError, match=r"fresh=true: .*mine is a link to .*real; choose another name"):
        RunFolder(OmegaConf.merge(cfg, {"fresh": True}))
    assert (tmp_path / "real" / "config.yaml").is_file()


# Saving


class Weights:
    """What a run saves, without a model around it."""

    def __init__(self, size=1000, value=1.0):
        self.parts = {part: {"weight": torch.full((size,), value)} for part in PARTS}
        self.parts["step"] = {"weight": torch.tensor(value)}
        self.family = SimpleNamespace(num_image_tokens=lambda reducer: 4)
        self.trainable = SimpleNamespace(peft_model=None, parameters=["weight"])

    def shapes(self):
        return {"weight": tuple(self.parts["weights"]["weight"].shape)}

    def gather(self, part):
        return self.parts[part]

    def restore(self, part, tensors):
        self.parts[part] = tensors

    def weights(self):
        return self.parts["weights"], {}


@contextmanager
def small_files(size):
    """Let every write beyond a size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_leaves_the_state_before(cfg):
    run = begin(cfg)
    run.save_state(Weights(value=5.0), 5)
    with pytest.raises(OSError, match="File too large") as full, small_files(2000):
        run.save_state(Weights(value=10.0), 10)
    assert full.value.errno == errno.EFBIG

    # With space again, the run goes on from the state before, and saves the same step.
    engine = Weights()
    assert run.resume(engine) == 5
    assert all(tensors["weight"].flatten()[0] == 5 for tensors in engine.parts.values())
    run.save_state(Weights(value=10.0), 10)
    assert RunFolder(cfg).resume(engine) == 10

    # The projector at the end as well.
    with pytest.raises(OSError, match="too large") as full, small_files(2000):
        save_trained(run, Weights())
    assert full.value.errno == errno.EFBIG
    save_trained(run, Weights())
    assert (run.path / "projector.safetensors").is_file() and not list(run.path.glob("*tmp"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_value_that_is_not_finite_is_kept(cfg, value):
    run = begin(cfg)
    broken = Weights(value=value)
    with pytest.raises(UserError, match=r"state after step 5 \(weights\): weight holds values that are not"):
        run.save_state(broken, 5)
    assert run.resume(broken) == 0
    with pytest.raises(UserError, match=r"the tuned projector of .*mine: weight holds values that are not"):
        save_trained(run, broken)
    assert not list(run.path.glob("projector*"))


def save_trained(run, engine):
    data = {"hash": "a", "num_rows": 1, "fraction": 1.0, "seed": 0}
    template = config.instantiate_target(run.cfg.model.template)
    run.save_trained(engine, {}, reducer=None, template=template, manifest=data)
