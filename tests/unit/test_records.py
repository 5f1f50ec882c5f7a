"""What a run says of itself."""

import platform
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from tests.conftest import ROOT
from train import config, hardware
from train.checkpoint import RunFolder, environment_record
from train.hardware import device_name

CPUINFO = (
    "processor\t: 0\nmodel name\t: A Processor\nmodel\t\t: 7\nprocessor\t: 1\nmodel name\t: A Processor\n"
)


def settings_of(*overrides, hydra=False):
    """The run's settings, with those of Hydra where they are asked for."""
    config.register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("tune", overrides=list(overrides), return_hydra_config=hydra)


@pytest.mark.parametrize("mode", ["RUN", "MULTIRUN"])
def test_a_run_of_a_sweep_records_the_command_of_itself(monkeypatch, mode):
    job = settings_of("reducer.budget=4", "+exp=sweep-budget", f"hydra.mode={mode}", hydra=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", job)
    monkeypatch.setattr(sys, "argv", ["train/tune.py", "+exp=sweep-budget"])
    alone = (
        ["reducer.budget=4", "+exp=sweep-budget", "hydra.mode=RUN"]
        if mode == "MULTIRUN"
        else ["+exp=sweep-budget"]
    )
    assert environment_record(job, world_size=1)["command"] == ["train/tune.py", *alone]


def test_settings_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("deepspeed.comm.barrier", lambda: None)
    cfg = settings_of(f"runs={tmp_path}", "name=mine")
    folder = RunFolder(cfg, rank=0)
    folder.begin({"hash": "a"}, num_trainable=1, world_size=1)
    before = (folder.path / "config.yaml").read_text()

    def cut(path, text):
        with path.open("w") as file:
            file.write(text[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        folder.begin({"hash": "a"}, num_trainable=1, world_size=1)
    assert (folder.path / "config.yaml").read_text() == before


def test_a_processor_has_a_name(monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) == "/proc/cpuinfo")
    monkeypatch.setattr(Path, "read_text", lambda path: CPUINFO)
    assert device_name(torch.device("cpu")) == "A Processor"
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    assert device_name(torch.device("cpu")) == platform.processor()


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("avx512f avx512_bf16", "bfloat16"),
        ("fp asimd bf16 i8mm", "bfloat16"),
        ("avx512f avx512_vnni", "float32"),
        ("", "float32"),
    ],
)
def test_a_processor_without_bf16_computes_in_float32(tmp_path, monkeypatch, flags, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert hardware.native_dtype() == "float32"
    (tmp_path / "cpuinfo").write_text(f"model name\t: A Processor\nflags\t\t: fpu {flags}\n")
    assert hardware.native_dtype() == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.native_dtype() == "bfloat16"
