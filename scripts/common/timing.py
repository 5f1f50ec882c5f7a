"""What scripts share: works timed in turns, peak memory, the machine that figures hold for, and their files."""

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from train.hardware import current_environment

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s of NVIDIA's data sheets, by a part of the device's name; the first that fits counts."""


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternating(
    works: Mapping[str, Callable[[], Any]], *, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each work in each round.

    The works of a round run one after the other, so that a machine that slows down slows all of them, and each round starts
    with another one. Each work runs once before the first round.
    """
    for work in works.values():
        work()
    names, seconds = list(works), {name: [] for name in works}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronise(device)
            start = time.perf_counter()
            works[name]()
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _resident(entry: str) -> int:
    """Bytes of this process: "VmRSS", now, or "VmHWM", at most."""
    found = re.search(rf"^{entry}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def peak_memory(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that `work` takes at most, above what was there before.

    On a GPU those of torch's allocator; on the CPU of Linux those of the process, which also has what libraries take when they
    first run: let the work run once before. None elsewhere.
    """
    gc.collect()  # what is garbage now would hide as much of the work's
    if device.type == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        work()
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps freed memory, which the work would take without a trace
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def sheet_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s by the data sheet of the GPU with this name; None for one that is not in `PEAKS`."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s, where the figure is from): in bf16 a known GPU's data sheet, else a measured matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if (peak := sheet_peak(name)) is not None:
            return peak, f"data sheet of {name}"
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    seconds = alternating({"product": lambda: a @ b}, rounds=5, device=device)["product"]
    return 2 * size**3 / min(
        seconds
    ), f"best of 5 products of {size} x {size} matrices in {str(dtype).removeprefix('torch.')}"


def where(device: torch.device) -> dict[str, Any]:
    """What figures hold for: device, CPU cores, torch's threads, versions, commit, date."""
    environment = current_environment(device)
    return {
        "device": environment.device,
        "cores": environment.num_cpus,
        "threads": torch.get_num_threads(),
        "python": environment.python,
        "torch": environment.torch,
        "commit": environment.short_commit,
        "date": environment.date,
    }
