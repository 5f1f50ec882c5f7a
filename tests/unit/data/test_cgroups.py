"""Limits of containers, in both versions of Linux' control groups."""

import os

import pytest

from data import cgroups
from data.cgroups import memory_limits, usable_cpus

FILES = {
    "version 2": {
        "box/job/memory.max": "max\n",
        "box/memory.max": "4096\n",
        "memory.max": "8192\n",
        "box/job/cpu.max": "max 100000\n",
        "box/cpu.max": "250000 100000\n",
    },
    "version 1": {
        "memory/box/job/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/box/memory.limit_in_bytes": "4096\n",
        "cpu/box/job/cpu.cfs_quota_us": "-1\n",
        "cpu/box/job/cpu.cfs_period_us": "100000\n",
        "cpu/cpu.cfs_quota_us": "250000\n",
        "cpu/cpu.cfs_period_us": "100000\n",
    },
}
OWN = {
    "version 2": "0::/box/job\n",
    "version 1": "5:memory:/box/job\n4:cpu,cpuacct:/box/job\n1:name=systemd:/x\n0::/\n",
}


@pytest.mark.parametrize("version", FILES)
def test_the_lowest_limit_of_all_groups_around_a_process_counts(monkeypatch, tmp_path, version):
    for name, content in FILES[version].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    own = tmp_path / "own"
    own.write_text(OWN[version])
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "OWN_GROUPS", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert min(memory_limits()) == 4096
    assert usable_cpus() == 2


def test_without_control_groups_there_are_no_limits_and_a_part_of_a_cpu_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3})
    assert memory_limits() == [] and usable_cpus() == 2
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cpus() == 1
