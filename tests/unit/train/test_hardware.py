"""What a result was computed with."""

import platform

import pytest
import torch

from train import hardware
from train.hardware import Environment, current_environment, device_name

CPUINFO = (
    "processor\t: 0\nmodel name\t: A Processor\nmodel\t\t: 7\nprocessor\t: 1\nmodel name\t: A Processor\n"
)


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """The file that stands for Linux's. It does not exist yet."""
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "cpuinfo"


def test_a_processor_has_a_name(cpuinfo):
    assert device_name(torch.device("cpu")) == platform.processor()
    cpuinfo.write_text(CPUINFO)
    assert device_name(torch.device("cpu")) == "A Processor"


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("avx512f avx512_bf16", "bfloat16"),
        ("fp asimd bf16 i8mm", "bfloat16"),
        ("avx512f avx512_vnni", "float32"),
        ("", "float32"),
    ],
)
def test_a_processor_without_bf16_computes_in_float32(cpuinfo, monkeypatch, flags, dtype):
    assert hardware.native_dtype() == "float32"
    cpuinfo.write_text(f"model name\t: A Processor\nflags\t\t: fpu {flags}\n")
    assert hardware.native_dtype() == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.native_dtype() == "bfloat16"


def environment(**changes):
    values = {"date": "2025-12-31", "commit": "0123456789abcdef", "modified_files": [], "python": "3.11"}
    values |= {"torch": "2.9", "device": "A Processor", "num_cpus": 2}
    return Environment(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "short"),
    [
        ({}, "0123456"),
        ({"modified_files": ["?? notes.txt"]}, "0123456"),
        ({"modified_files": ["?? notes.txt", " M README.md"]}, "0123456-dirty"),
        ({"commit": None}, "unknown"),
    ],
)
def test_a_short_commit_says_whether_tracked_files_differ(changes, short):
    assert environment(**changes).short_commit == short


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    here = current_environment(torch.device("cpu"))
    assert here.commit is None and here.modified_files == [] and here.short_commit == "unknown"
    assert here.torch == torch.__version__ and here.num_cpus >= 1
