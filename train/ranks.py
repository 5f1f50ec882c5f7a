"""The processes of a run: joining them, printing once, and passing values between them."""

import logging
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import deepspeed
import torch

T = TypeVar("T")


def init_distributed() -> None:
    """Join the ranks that the launcher started, or be a world of one without a launcher."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # An all-reduce in shared memory for CPUs, which DeepSpeed would compile for a minute, and again when a flag changes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before the first collective, which would use GPU 0 on all
    deepspeed.init_distributed(verbose=False)
    if not torch.cuda.is_available():  # ranks of one machine share its cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_SIZE", "1"))))


def leave_distributed() -> None:
    """Part from the other ranks in order: a rank that just ends may abort in its threads, after all work was done."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes."""
    return bool(deepspeed.comm.get_rank() == 0)


def say(what: str | Callable[..., None], *arguments: Any, **settings: Any) -> None:
    """Print a line, or call a function that prints, on rank 0 alone."""
    if is_main():
        print(what, flush=True) if isinstance(what, str) else what(*arguments, **settings)


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank: the ranks of other hosts don't see its files."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def in_turn(make: Callable[[], T]) -> T:
    """`make()` on every rank: first on rank 0, then on one of each other host; the rest find what these left on disk."""
    local_rank = int(os.environ["LOCAL_RANK"])
    turns = [is_main(), local_rank == 0 and not is_main(), local_rank > 0]
    for turn in turns:
        if turn:
            made = make()
        deepspeed.comm.barrier()
    return made


def gather(values: list[Any]) -> list[Any]:
    """The values of all ranks, one rank after the other, on every rank."""
    parts: list[Any] = [None] * deepspeed.comm.get_world_size()
    torch.distributed.all_gather_object(parts, values)
    return [value for part in parts for value in part]
