"""What a process that trains does before the slow imports. Importing this sets variables for torch."""

import os

from train.guards.launcher import launcher_watch
from train.guards.signals import STOP

# On a CPU, spinning threads slow down the others. On a GPU, lengths that vary fragment the memory.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def listen() -> None:
    """Take signals that ask this run to stop, and notice if its launcher ends."""
    STOP.listen(launcher_watch())
