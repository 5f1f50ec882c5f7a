"""Signals that ask a run to stop: Ctrl-C, and those that clusters send before they take a machine.

During the training steps a signal is only noted, and the loop saves a state before it ends. At any
other time it ends the process at once.

A thread takes the signals. Python's own handlers run in the main thread alone, and that may wait in
a collective for a rank that will never come.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

STOPS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)
"""Signals that ask a run to stop. If the ranks got several, the first in this list counts."""

SAME_PRESS_S = 1.0
"""A second Ctrl-C within so many seconds is the same one, which a launcher handed on."""

POLL_S = 0.5
"""Seconds between two looks at the launcher."""

ORPHAN_S = 300.0
"""Seconds that a rank without its launcher may take to save: it may wait for a rank that is gone."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """A signal stopped the run, and its state is saved.

    Args:
        number: the signal.
        num_done: steps that are done.
        num_steps: steps of the run.
    """

    def __init__(self, number: int, num_done: int, num_steps: int) -> None:
        super().__init__(
            f"stopped by {_name(number)} after {num_done} of {num_steps} steps, which are saved; the same "
            f"command goes on from there, unless it has fresh=true"
        )
        self.exit_code = exit_code(number)


def exit_code(number: int) -> int:
    """Return the exit code of a process that a signal ends, the same as in shells."""
    return 128 + number


def _name(number: int) -> str:
    """Return what users call a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _print_from_rank0(text: str) -> None:
    """Print a line on stderr. The other ranks would only repeat it."""
    if os.environ.get("RANK", "0") != "0":
        return

    # The terminal, or the program that reads from us, may be gone. That must not keep us here.
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class StopRequest:
    """What this process knows about signals to stop. There is one, `STOP`.

    Attributes:
        number: the first signal that arrived here; 0 if none did.
        agreed: the signal after which all ranks stop; 0 if no rank got one.
    """

    def __init__(self) -> None:
        self.number = 0
        self.agreed = 0
        self._time = 0.0
        self._is_noting = False
        self._launcher_is_gone: Callable[[], bool] = lambda: False
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        self._terminals: list[int] = []

    def listen(self, launcher_is_gone: Callable[[], bool]) -> None:
        """Take signals from now on. Only the first call does anything.

        Args:
            launcher_is_gone: tells whether the launcher that started this rank has ended.
        """
        if self._pipe is not None:
            return

        self._launcher_is_gone = launcher_is_gone
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

        # The system's handler writes the number of each signal into this pipe, whatever the main
        # thread does. The handlers in Python have nothing left to do.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in STOPS:
            # A signal that is ignored stays ignored: nohup and shells ask for it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

        # A forked child has the same pipe: until it lets go, signals to it would look like ours.
        os.register_at_fork(
            before=self._hold_signals,
            after_in_parent=self._release_signals,
            after_in_child=self._leave_to_parent,
        )
        threading.Thread(target=self._serve, args=(self._pipe[0],), daemon=True, name="signals").start()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Only note signals inside this block: the training loop saves a state and ends by itself."""
        with self._lock:
            self._is_noting = True
        try:
            yield
        finally:
            with self._lock:
                self._is_noting = False

        # The loop was done before it saw the signal.
        if self.number:
            self._end()

    def flags(self) -> list[float]:
        """Return one number for each signal in `STOPS`: 1 for the one that arrived."""
        return [float(number == self.number) for number in STOPS]

    def agree(self, counts: Sequence[float]) -> None:
        """Learn which signals the ranks got.

        Args:
            counts: the `flags` of all ranks, added up.
        """
        # All ranks must choose the same signal. After that, this rank ends by itself, and further
        # signals of a launcher must not disturb it.
        arrived = [number for number, count in zip(STOPS, counts, strict=True) if count]
        self.agreed = arrived[0] if arrived else 0

    def _hold_signals(self) -> None:
        """Make signals wait while this thread forks."""
        if self._pipe is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def _release_signals(self) -> None:
        """Take the signals that have waited."""
        if self._pipe is not None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def _leave_to_parent(self) -> None:
        """Undo `listen` in a forked child."""
        if self._pipe is None:
            return
        signal.set_wakeup_fd(-1)
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                is_interrupt = number == signal.SIGINT
                signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
        self._release_signals()
        self._pipe = None

    def _serve(self, pipe: int) -> None:
        """Wait for signals, and for the end of the launcher."""
        while True:
            is_readable, _, _ = select.select([pipe], [], [], POLL_S)
            if is_readable:
                for number in os.read(pipe, 64):
                    self._take(number)
            elif self._launcher_is_gone():
                self._take(signal.SIGTERM)
                if time.monotonic() - self._time > ORPHAN_S:
                    self._end()

    def _take(self, number: int) -> None:
        """Note a signal, or obey it at once."""
        if number not in STOPS:
            return

        # Nobody reads what is printed after a hangup, and writing to the lost terminal is an error.
        if number == signal.SIGHUP:
            self._let_go_of_terminals()

        with self._lock:
            seconds = time.monotonic() - self._time
            is_first = not self.number
            if is_first:
                self.number = number
                self._time = time.monotonic()
            is_noted = self._is_noting or self.agreed

        is_second_press = not is_first and number == signal.SIGINT and seconds > SAME_PRESS_S
        if is_second_press or not is_noted:
            self._end()
        if is_first and not self.agreed:
            _print_from_rank0("\nstopping after this step, with a saved state; a second Ctrl-C ends at once")

    def _let_go_of_terminals(self) -> None:
        """Send to nowhere what this process prints on a terminal."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _end(self) -> None:
        """End this process at once. A normal exit could wait for other ranks."""
        _print_from_rank0(
            f"\nerror: stopped by {_name(self.number)} without saving; the same command goes on from what "
            f"is saved"
        )
        os._exit(exit_code(self.number))


STOP = StopRequest()
"""The signals of this process."""
