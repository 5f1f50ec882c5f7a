"""The processes of a run, called ranks: join them, print once, pass values between them.

Everything but `init_distributed` also works in a single process, which is rank 0 of 1.
"""

import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import distributed

from data.cgroups import usable_cpus
from vzip import UserError

T = TypeVar("T")


def get_rank() -> int:
    """Return the number of this process; 0 without other processes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def num_local_ranks() -> int:
    """Return the number of processes on this machine."""
    # DeepSpeed's launcher sets the first variable, torchrun the second one.
    size = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return int(size)


def is_main() -> bool:
    """Tell whether this is rank 0, which prints and writes."""
    return get_rank() == 0


def barrier() -> None:
    """Wait until all ranks are here."""
    if distributed.is_initialized():
        distributed.barrier()


def print_rank0(what: str | Callable[..., None], *arguments: Any, **settings: Any) -> None:
    """Print a line, or call a function that prints, only on rank 0."""
    if not is_main():
        return
    if isinstance(what, str):
        print(what, flush=True)
    else:
        what(*arguments, **settings)


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's value on every rank: the ranks of other hosts do not see its files."""
    if not distributed.is_initialized():
        return value

    # torch replaces the items of a list in place.
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_rank0(action: Callable[[], T]) -> T:
    """Call `action` on rank 0. Return its value, or raise its error, on every rank.

    If only rank 0 raised, the others would wait for it in their next collective. Errors that no user
    can cause are raised on rank 0 alone: their traceback says where.
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main():
        try:
            outcome = (action(), None)
        except (UserError, OSError) as error:
            outcome = (None, error)

    value, error = broadcast_from_rank0(outcome)
    if error is not None:
        raise error
    result: T = value
    return result


def all_gather_list(values: list[Any]) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks, on every rank."""
    if not distributed.is_initialized():
        return list(values)

    # torch fills a list that has one place per rank. Then join the lists of all ranks.
    values_by_rank: list[list[Any]] = [[] for _ in range(get_world_size())]
    distributed.all_gather_object(values_by_rank, values)
    return [value for values_of_rank in values_by_rank for value in values_of_rank]


def main_first(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 first, then on one rank of each other host, then on the rest.

    `make` keeps its work on disk, where the other ranks of the host find it.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    # Three rounds, and a barrier after each. A rank has its turn in one of them.
    turns = [is_main(), local_rank == 0 and not is_main(), local_rank > 0]
    for is_my_turn in turns:
        if is_my_turn:
            result = make()
        barrier()
    return result


def init_distributed() -> None:
    """Join the ranks that a launcher or srun started, or become the only rank.

    A sweep calls this once for each of its runs. Only the first call does anything.

    Raises:
        UserError: a host has more ranks than GPUs that they can see.
    """
    if distributed.is_initialized():
        return

    # DeepSpeed takes seconds to import, and most modules need only the functions above.
    import deepspeed

    # Without a launcher or srun, this process is the only rank.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        os.environ.update(_srun_ranks(os.environ) or _single_rank())

    # For CPUs, DeepSpeed would compile its all-reduce in shared memory. That takes a minute, and
    # again whenever a flag changes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    if torch.cuda.is_available():
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False)

    # The ranks of one machine share the cores that its container has.
    if not torch.cuda.is_available():
        num_threads = min(torch.get_num_threads(), usable_cpus())
        torch.set_num_threads(max(1, num_threads // num_local_ranks()))


def leave_distributed() -> None:
    """Leave the other ranks in order: a rank that just ends may abort in one of its threads."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _take_gpu(local_rank: int) -> None:
    """Select this rank's GPU. Otherwise the first collective would use GPU 0 on all ranks."""
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"rank {local_rank} of this host sees {num_gpus} GPUs; start one rank per GPU, each "
            f"seeing all GPUs of the host: with srun --gpus-per-node=N --ntasks-per-node=N, not "
            f"--gpus-per-task"
        )
    torch.cuda.set_device(local_rank)


def _single_rank() -> dict[str, str]:
    """Return the variables that a launcher would set for a single process."""
    # Port 0 makes the system choose a free one, so that several runs on a machine don't collide.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _srun_ranks(slurm: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a launcher would set. Empty unless srun started several tasks.

    Only the variables of a step (SLURM_STEP_...) tell: an sbatch script outside of a step has
    SLURM_PROCID, and the shell of salloc has SLURM_NTASKS. Task 0 runs on the first host of the
    step. SLURM_LAUNCH_NODE_IPADDR is the host where srun was typed, which may be a login node.
    """
    if int(slurm.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}

    tasks_per_node = _tasks_per_node(slurm["SLURM_STEP_TASKS_PER_NODE"])
    local_size = tasks_per_node[int(slurm["SLURM_NODEID"])]

    # Every task computes the same port, below the range that Linux gives to clients.
    port = 10_000 + (31 * int(slurm["SLURM_JOB_ID"]) + int(slurm["SLURM_STEP_ID"])) % 20_000
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_SIZE": str(local_size),
        "MASTER_ADDR": slurm.get("MASTER_ADDR", _first_host(slurm["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": slurm.get("MASTER_PORT", str(port)),
    }


def _first_host(nodelist: str) -> str:
    """Return the first host of Slurm's compact list: node07 for "node[07-09,12],login1"."""
    # Take all up to the first comma outside of brackets. Then replace each pair of brackets by the
    # first number in it.
    first_entry = re.match(r"(?:[^,\[]|\[[^]]*])+", nodelist)
    assert first_entry, nodelist
    return re.sub(r"\[(\w+)[^]]*]", r"\1", first_entry[0])


def _tasks_per_node(counts: str) -> list[int]:
    """Unpack Slurm's compact list of tasks per node: [2, 2, 1] for "2(x2),1"."""
    tasks: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(number)] * int(times or 1)
    return tasks
