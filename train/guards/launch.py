"""Start DeepSpeed's launcher, and hand on to the ranks the signals that ask a run to stop.

    python -m train.guards.launch ARGUMENTS        takes the arguments of `deepspeed`

`deepspeed` itself ends with a traceback after Ctrl-C, and kills a rank that needs more than 30 s to
finish its step and save. Here the ranks get the signal, and everybody waits for them.
"""

import functools
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

import psutil

from train.guards.signals import STOPS, exit_code

LAUNCH = "deepspeed.launcher.launch"
"""The process of DeepSpeed whose children are the ranks of this machine."""


def _ranks(launcher: psutil.Process) -> list[psutil.Process]:
    """List the ranks of this machine that are running."""
    for process in [launcher, *launcher.children(recursive=True)]:
        if LAUNCH in process.cmdline():
            return process.children()
    return []


def _hand_on(launcher: psutil.Process, number: int, _frame: FrameType | None) -> None:
    """Send a signal to the ranks. Before there are any, end the launcher."""
    # A process may end while we look.
    try:
        ranks = _ranks(launcher)
        processes = ranks or [*launcher.children(recursive=True), launcher]
    except psutil.NoSuchProcess:
        return

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number if ranks else signal.SIGTERM)
    if ranks:
        return
    print("error: stopped before the run began", file=sys.stderr, flush=True)
    sys.exit(exit_code(number))


def main(arguments: list[str]) -> int:
    """Run `deepspeed` with these arguments. Return its exit code."""
    # The launcher has a process group of its own, so that Ctrl-C reaches only this process.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *arguments]
    launcher = subprocess.Popen(command, process_group=0)

    hand_on = functools.partial(_hand_on, psutil.Process(launcher.pid))
    for number in STOPS:
        # A signal that is ignored stays ignored: nohup and shells ask for it.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, hand_on)

    # The wait goes on after a signal: ranks save their state first.
    code = launcher.wait()
    return code if code >= 0 else exit_code(-code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
