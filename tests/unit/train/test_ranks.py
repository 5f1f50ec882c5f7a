"""A step of srun gives each task its rank, and only a step does."""

import pytest

from train.ranks import _first_host, _single_rank, _srun_ranks, _tasks_per_node

JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "5", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[07-08]"}
SHELLS = {
    "no Slurm": {},
    "salloc": JOB | {"SLURM_TASKS_PER_NODE": "3,2"},
    "sbatch": JOB
    | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "3,2"},
    "srun --pty bash": JOB
    | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "node07"},
}


def task(rank, node, local, **changes):
    """The variables of one of 5 tasks on 2 hosts."""
    step = {
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "SLURM_STEP_TASKS_PER_NODE": "3,2",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",  # of the login node
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
    }
    return JOB | step | changes


def test_each_task_has_its_rank_and_all_meet_on_the_steps_first_host():
    tasks = [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0), (4, 1, 1)]
    found = [_srun_ranks(task(*where)) for where in tasks]
    for (rank, node, local), each in zip(tasks, found, strict=True):
        assert (each["RANK"], each["LOCAL_RANK"]) == (str(rank), str(local))
        assert each["LOCAL_SIZE"] == str((3, 2)[node])
        assert (each["WORLD_SIZE"], each["MASTER_ADDR"]) == ("5", "node07")

    (port,) = {int(each["MASTER_PORT"]) for each in found}
    assert 1024 < port < 32_768  # below those that Linux gives to clients
    assert set(found[0]) == set(_single_rank())


def test_steps_of_a_job_have_ports_of_their_own_and_an_address_that_is_set_stays():
    ports = {_srun_ranks(task(0, 0, 0, SLURM_STEP_ID=str(step)))["MASTER_PORT"] for step in range(20)}
    assert len(ports) == 20
    ranks = _srun_ranks(task(0, 0, 0, MASTER_ADDR="ib0.node07", MASTER_PORT="12345"))
    assert (ranks["MASTER_ADDR"], ranks["MASTER_PORT"]) == ("ib0.node07", "12345")


@pytest.mark.parametrize("shell", SHELLS)
def test_python_outside_of_a_step_is_a_world_of_one(shell):
    assert _srun_ranks(SHELLS[shell]) == {}


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("node[007-009,012],gpu1", "node007"),
        ("gpu-a[3,5-6]", "gpu-a3"),
        ("rack[1-2]node[0-3]", "rack1node0"),
        ("node[1-2]-ib", "node1-ib"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_the_first_host_of_slurms_list(nodelist, host):
    assert _first_host(nodelist) == host


@pytest.mark.parametrize(
    ("counts", "expected"), [("4", [4]), ("2(x3)", [2, 2, 2]), ("2(x2),1,8(x1)", [2, 2, 1, 8])]
)
def test_slurms_tasks_by_node(counts, expected):
    assert _tasks_per_node(counts) == expected
