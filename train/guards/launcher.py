"""The launcher that started a rank, and the commands around it: when one ends, the rank must end.

The ranks have to look themselves. DeepSpeed's launcher does not outlive SIGKILL, and `deepspeed`, which
starts it, does not even hand SIGTERM on.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

LAUNCHERS = {
    "deepspeed",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torchrun",
    "torch.distributed.run",
    "train.guards.launch",
}
"""Words of a command that starts ranks."""


def _has_launcher(variables: Mapping[str, str]) -> bool:
    """Tell whether a launcher started this process, by the variables that only launchers set."""
    # DeepSpeed's launcher sets the first one, torchrun the second one.
    return "CROSS_RANK" in variables or "TORCHELASTIC_RUN_ID" in variables


def _is_launcher(process: "psutil.Process") -> bool:
    """Tell whether a process starts ranks, or is a make around one that does."""
    import psutil

    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    # The name stands among the first words: behind Python, its options and `-m`.
    names = {Path(word).name for word in words[:6]}
    return bool(names & LAUNCHERS) or (bool(words) and Path(words[0]).name in ("make", "gmake"))


def launcher_watch() -> Callable[[], bool]:
    """Return a function that tells whether one of the commands that started this rank has ended.

    Without a launcher it never has: a run under nohup outlives its shell.
    """
    if not _has_launcher(os.environ):
        return lambda: False

    # psutil comes with DeepSpeed, and only ranks of a launcher need it.
    import psutil

    # From this rank's parent up to the outermost launcher, with the shells between. The shell in
    # which the user typed the command is not among them.
    parents = psutil.Process().parents()
    depths = [depth for depth, process in enumerate(parents) if _is_launcher(process)]
    watched = parents[: max(depths, default=0) + 1]

    def is_gone() -> bool:
        return any(_has_ended(process) for process in watched)

    return is_gone


def _has_ended(process: "psutil.Process") -> bool:
    """Tell whether a process has ended, also if nobody has asked for its exit code yet."""
    import psutil

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
