"""The limits that a container or a scheduler sets for this process: memory and CPUs.

Linux calls them control groups. Version 1 has a folder for each resource, version 2 one for all.
"""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux mounts control groups."""

OWN_GROUPS = Path("/proc/self/cgroup")
"""The groups of this process, one a line: number:resources:path."""


def _limiting_groups(resource: str) -> Iterator[Path]:
    """Yield the folders of the groups that limit a resource of this process.

    Args:
        resource: its name in version 1, "memory" or "cpu".
    """
    # In a container, the path of a group may be the host's: then only the roots exist here.
    roots = {"": CGROUPS, resource: CGROUPS / resource}
    paths = dict.fromkeys(roots, "")
    if OWN_GROUPS.is_file():
        for line in OWN_GROUPS.read_text().splitlines():
            # Version 2 names no resources.
            _, resources, path = line.split(":", 2)
            for name in resources.split(","):
                if name in roots:
                    paths[name] = path.removeprefix("/")

    # A group is also bound by the limits of those around it.
    for name, root in roots.items():
        folder = root / paths[name]
        while folder.is_relative_to(root):
            yield folder
            folder = folder.parent


def _read(file: Path) -> list[str]:
    """Read the words of a file. An empty list if there is no such file."""
    return file.read_text().split() if file.is_file() else []


def memory_limits() -> list[int]:
    """Return all limits of this process' memory, in bytes."""
    limits = []
    for folder in _limiting_groups("memory"):
        # "max" in version 2 means no limit. Version 1 has a very large number instead.
        words = _read(folder / "memory.max") + _read(folder / "memory.limit_in_bytes")
        limits += [int(word) for word in words if word.isdecimal()]
    return limits


def usable_cpus() -> int:
    """Return how many CPUs this process may use at once, at least 1."""
    # A scheduler may tie a process to some CPUs.
    if hasattr(os, "sched_getaffinity"):
        num_cpus = len(os.sched_getaffinity(0))
    else:
        num_cpus = os.cpu_count() or 1

    # A container may use all CPUs, but only for so long: 150000 of each 100000 us are 1.5 CPUs.
    for folder in _limiting_groups("cpu"):
        words = _read(folder / "cpu.max")
        words = words or _read(folder / "cpu.cfs_quota_us") + _read(folder / "cpu.cfs_period_us")
        # No limit is "max" in version 2, and -1 in version 1.
        if len(words) == 2 and all(word.isdecimal() for word in words):
            quota, period = map(int, words)
            num_cpus = min(num_cpus, quota // period)
    return max(1, num_cpus)
