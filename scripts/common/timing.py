"""Time computations in alternation, measure peak memory, and record the machine of the figures."""

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from data.progress import progress
from train.hardware import current_environment

# Dense FLOP/s in bf16 from NVIDIA's data sheets, by a part of the device's name. The first match
# counts, so longer names come first.
DATA_SHEETS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
}


def where(device: torch.device) -> dict[str, Any]:
    """Record what figures were measured on: device, cores, threads, versions, commit and date."""
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


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    # A GPU works on while Python goes on. A CPU is finished when a call returns.
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternating(
    works: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    device: torch.device,
    title: str | None = None,
) -> dict[str, list[float]]:
    """Time several computations in alternation. Return the seconds of each round, by name.

    In each round they run one after the other, so that a machine that slows down slows all of them.
    Each round starts with another one. Before the first round, each computation runs once and is
    not timed.

    Args:
        works: the computations.
        rounds: how often each one is timed.
        device: the device that they run on.
        title: title of a progress bar; None for no bar.
    """
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    num_runs = len(names) * (1 + rounds)
    with progress(None, total=num_runs, title=title or "", unit="run", shown=title is not None) as bar:
        # Run each one once: the first run compiles kernels and fills caches.
        for work in works.values():
            work()
            bar.update()

        # Rotate the order, so that no computation always runs after the same other one.
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                synchronize(device)
                start = time.perf_counter()
                works[name]()
                synchronize(device)
                seconds[name].append(time.perf_counter() - start)
                bar.update()

    return seconds


def peak_memory(work: Callable[[], Any], device: torch.device) -> int | None:
    """Measure how many bytes a computation takes at its peak, above what was allocated before.

    On a GPU this counts torch's allocator. On Linux without a GPU it counts the whole process,
    including what libraries allocate when they first run, so run the computation once before.
    Returns None on other systems.
    """
    # Collect garbage first. If it were freed during the computation, the peak would look lower.
    gc.collect()

    if device.type == "cuda":
        return _peak_of_allocator(work, device)
    if sys.platform == "linux":
        return _peak_of_process(work)

    # The work must run in any case: callers keep its result.
    work()
    return None


def _peak_of_allocator(work: Callable[[], Any], device: torch.device) -> int:
    """Measure the peak of torch's allocator on a GPU."""
    # Work that was started before must not count.
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_process(work: Callable[[], Any]) -> int:
    """Measure the peak of this process' resident memory, on Linux."""
    # glibc keeps freed memory, which the computation would reuse without raising the peak. Give it
    # back to the system first.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

    # Writing 5 resets the recorded peak to the current size.
    Path("/proc/self/clear_refs").write_text("5")
    before = _process_memory("VmRSS")
    work()
    return _process_memory("VmHWM") - before


def _process_memory(entry: str) -> int:
    """Read the bytes of this process' resident memory: now ("VmRSS"), or at the peak ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{entry}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])


def sheet_peak(name: str) -> float | None:
    """Return a GPU's dense FLOP/s in bf16 by its data sheet; None if `DATA_SHEETS` lacks it."""
    for model, peak in DATA_SHEETS.items():
        if model in name:
            return peak
    return None


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the device's peak performance, and where the figure is from.

    In bf16 on a known GPU it is from the data sheet. Otherwise it is the best of five measured
    matrix products.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        peak = sheet_peak(name)
        if peak is not None:
            return peak, f"data sheet of {name}"

    # Other devices are measured, with matrices that keep them busy.
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()
    seconds = alternating({"product": lambda: a @ b}, rounds=5, device=device)["product"]

    precision = str(dtype).removeprefix("torch.")
    source = f"best of 5 products of {size} x {size} matrices in {precision}"
    return 2 * size**3 / min(seconds), source
