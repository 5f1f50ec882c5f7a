"""Timing in alternation, peak memory and the record of the environment."""

import gc
import sys

import pytest
import torch

from scripts.common.timing import alternating, peak_flops, peak_memory, sheet_peak, where

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MEGABYTE = 2**20

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


def allocate(megabytes):
    return torch.ones(megabytes * MEGABYTE // 4)


def test_computations_take_turns_after_a_first_run():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}

    seconds = alternating(works, rounds=4, device=CPU)

    # Each round starts with another one.
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(time > 0 for times in seconds.values() for time in times)


@linux
def test_peak_memory_counts_what_a_computation_allocates_on_top():
    existing = allocate(64)

    def work():
        allocate(96)  # freed before the computation ends

    assert 95 * MEGABYTE < peak_memory(work, CPU) < 100 * MEGABYTE
    assert peak_memory(existing.sum, CPU) < 4 * MEGABYTE  # the peak before does not count


@linux
def test_peak_memory_counts_what_the_allocator_had_kept():
    def work():
        # 64 KiB each: too small to be given back to the system one by one.
        return [torch.ones(16 * 1024) for _ in range(1024)]

    kept = work()
    end = torch.ones(16 * 1024)
    del kept
    assert peak_memory(work, CPU) >= 60 * MEGABYTE
    del end


@linux
def test_garbage_does_not_hide_what_a_computation_allocates():
    garbage = [allocate(64)]
    garbage.append(garbage)
    del garbage

    def work():
        gc.collect()
        allocate(64)

    assert peak_memory(work, CPU) > 60 * MEGABYTE


def test_a_known_gpu_has_the_peak_of_its_data_sheet():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA GeForce RTX 3090": None,
    }
    assert {name: sheet_peak(name) for name in peaks} == peaks


def test_the_peak_of_another_device_is_measured():
    peak, source = peak_flops(CPU, torch.float32)
    assert peak > 1e8 and "product" in source and "float32" in source


def test_the_record_names_machine_and_versions():
    record = where(CPU)
    assert record["device"] and record["cores"] >= 1 and record["commit"]
    assert record["torch"] == torch.__version__
