"""The processes that load data for a rank: how many, and how they end."""

import os
import signal
import threading

from data.cgroups import usable_cpus

STOPS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)
"""Signals that ask a run to stop, as in `train.guards.signals`. They often reach all of its processes."""


def usable_workers(num_workers: int) -> int:
    """Limit the number of data workers to the CPUs that this process may use."""
    return min(num_workers, usable_cpus())


def outlive_stops(_number: int) -> None:
    """Make this worker leave signals to its rank, which still needs pictures to finish its step.

    A worker whose rank has ended ends by itself: torch looks every few seconds.
    """
    # Systems other than Linux don't tell who sent a signal.
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return

    # A blocked signal waits until the thread below takes it. Only SIGTERM from the rank ends the
    # worker: torch sends it to a worker that hangs.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    rank = os.getppid()

    def serve() -> None:
        while True:
            info = signal.sigwaitinfo(STOPS)
            if info.si_signo == signal.SIGTERM and info.si_pid == rank:
                os._exit(0)

    threading.Thread(target=serve, daemon=True).start()
