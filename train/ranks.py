"""The processes of a run: joining them, printing once, and passing values between them."""

import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import deepspeed
import torch

from vzip import UserError

T = TypeVar("T")


def _first_host(nodelist: str) -> str:
    """Of Slurm's list of hosts, e.g. node07 of "node[07-09,12],login1"."""
    first = re.match(r"(?:[^,\[]|\[[^]]*])+", nodelist)
    assert first, nodelist
    return re.sub(r"\[(\w+)[^]]*]", r"\1", first[0])


def _tasks_per_node(counts: str) -> list[int]:
    """Slurm's tasks by node, e.g. [2, 2, 1] of "2(x2),1"."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(number) for number, times in parts for _ in range(int(times or 1))]


def _srun_ranks(slurm: Mapping[str, str]) -> dict[str, str]:
    """What a launcher would set, in a step of several tasks that srun started; else nothing.

    Outside of a step an sbatch script has SLURM_PROCID, and salloc's shell SLURM_NTASKS: only a step's own variables tell.
    Task 0 is on the first host of the step; SLURM_LAUNCH_NODE_IPADDR is where srun was typed, which may be a login node.
    """
    if int(slurm.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    local_size = _tasks_per_node(slurm["SLURM_STEP_TASKS_PER_NODE"])[int(slurm["SLURM_NODEID"])]
    port = 10_000 + (31 * int(slurm["SLURM_JOB_ID"]) + int(slurm["SLURM_STEP_ID"])) % 20_000
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_SIZE": str(local_size),
        "MASTER_ADDR": slurm.get("MASTER_ADDR", _first_host(slurm["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": slurm.get("MASTER_PORT", str(port)),
    }


def _alone() -> dict[str, str]:
    """The variables of a world of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _take_gpu(local_rank: int) -> None:
    """Before the first collective, which would use GPU 0 on all ranks."""
    if local_rank >= (count := torch.cuda.device_count()):
        raise UserError(
            f"rank {local_rank} of this host sees {count} GPUs; start one rank a GPU, each seeing all of the host's: with srun "
            f"--gpus-per-node=N --ntasks-per-node=N, not --gpus-per-task"
        )
    torch.cuda.set_device(local_rank)


def init_distributed() -> None:
    """Join the ranks that a launcher or srun started, or be a world of one; once, though a sweep has several runs.

    Raises UserError on a host with more ranks than GPUs that they see.
    """
    if torch.distributed.is_initialized():
        return
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        os.environ.update(_srun_ranks(os.environ) or _alone())
    # An all-reduce in shared memory for CPUs, which DeepSpeed would compile for a minute, and again when a flag changes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False)
    if not torch.cuda.is_available():  # ranks of one machine share its cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1"))))


def leave_distributed() -> None:
    """Part from the other ranks in order: a rank that just ends may abort in its threads, after all work was done."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes."""
    return bool(deepspeed.comm.get_rank() == 0)


def print_rank0(what: str | Callable[..., None], *arguments: Any, **settings: Any) -> None:
    """Print a line, or call a function that prints, on rank 0 alone."""
    if is_main():
        print(what, flush=True) if isinstance(what, str) else what(*arguments, **settings)


def broadcast_from_rank0(value: Any) -> Any:
    """Rank 0's value, on every rank: the ranks of other hosts don't see its files."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def main_first(make: Callable[[], T]) -> T:
    """`make()` on every rank: first on rank 0, then on one of each other host; the rest find what these left on disk."""
    local_rank = int(os.environ["LOCAL_RANK"])
    turns = [is_main(), local_rank == 0 and not is_main(), local_rank > 0]
    for turn in turns:
        if turn:
            made = make()
        deepspeed.comm.barrier()
    return made


def all_gather_list(values: list[Any]) -> list[Any]:
    """The values of all ranks, one rank after the other, on every rank."""
    parts: list[Any] = [None] * deepspeed.comm.get_world_size()
    torch.distributed.all_gather_object(parts, values)
    return [value for part in parts for value in part]
