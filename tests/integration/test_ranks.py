"""Ranks that other programs start: as srun does, and the launcher on several hosts of a hostfile."""

import os
import sys

import pytest

from tests.helpers.commands import BIN, assert_same_metrics, begin, free_port, metrics, tune

pytestmark = pytest.mark.integration

JOB = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(overrides, runs):
    return [*overrides, "optim.max_steps=2", "evaluate.questions=0", f"runs={runs}"]


@pytest.fixture(scope="module")
def plain(settings, runs):
    """A run of an sbatch script that calls python: a single rank, whatever the size of the job."""
    first = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    tune([*settings, "name=plain"], **JOB, **first, SLURM_TASKS_PER_NODE="1(x2)")
    return runs / "plain"


def assert_all_succeed(processes):
    outputs = [process.communicate()[0] for process in processes]
    shown = "\n".join(output[-3000:] for output in outputs)
    assert [process.returncode for process in processes] == [0] * len(processes), shown


def assert_trained_as_one(run, plain):
    assert len(metrics(plain)) == 2
    assert_same_metrics(run, plain)
    assert '"world_size": 2' in (run / "env.json").read_text()


def test_two_tasks_of_srun_train_as_one(settings, runs, plain):
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
        "SLURM_NODEID": "0",
        "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1",  # a host that does not exist
    }
    tasks = []
    for rank in ("0", "1"):
        task = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        command = [sys.executable, "train/tune.py", *settings, "name=srun"]
        tasks.append(begin(command, **JOB, **step, **task))
    assert_all_succeed(tasks)
    assert_trained_as_one(runs / "srun", plain)


def test_two_hosts_of_a_hostfile_train_as_one(settings, runs, plain, tmp_path):
    """Without ssh: the launcher is started on each host, as `--no_ssh` wants it."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    launcher = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--log_level", "warning"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    run = ["train/tune.py", *settings, "name=hostfile"]
    assert_all_succeed([begin([*launcher, "--node_rank", str(rank), *run]) for rank in range(2)])
    assert_trained_as_one(runs / "hostfile", plain)
