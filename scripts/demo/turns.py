"""One thread that uses the model, and serves all readers in turns.

A turn is a few tokens of an answer. Whoever has had a turn waits behind all others, so a long answer
delays a short one by a turn, and not by its whole length.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, TypeVar

from vzip import UserError

T = TypeVar("T")
C = TypeVar("C")
VALUES_PER_TURN = 16
"""Number of values, such as tokens of an answer, that a turn produces at most."""


# eq=False: two readers of the same work are still different ones.
@dataclass(eq=False)
class _Job:
    """Work that is done in turns, and the values that wait for its reader."""

    work: Callable[[Any], Iterator[Any]]
    inside: Callable[[], AbstractContextManager[Any]]
    iterator: Iterator[Any] | None = None
    """The values that `work` has yet to produce. None before the first turn."""
    produced: SimpleQueue[tuple[Any, ...]] = field(default_factory=SimpleQueue)
    """Each value is in a tuple, so that the empty tuple can mark the end."""
    reader_left: Event = field(default_factory=Event)
    error: BaseException | None = None


class ModelThread:
    """A thread that does the work of many readers, in turns."""

    def __init__(self) -> None:
        # The thread takes turns in the order in which they were submitted, which is what makes it fair.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._stopped = Event()
        self._num_jobs = 0
        self._lock = Lock()

    def stream(
        self,
        work: Callable[[C], Iterator[T]],
        inside: Callable[[], AbstractContextManager[C]] = nullcontext,
    ) -> Generator[T]:
        """Yield the values of `work`, which runs in the model's thread.

        If the reader stops early, so does the work. After `stop`, the values end without an error.

        Args:
            work: produces the values. It is called with the value of the context.
            inside: makes the context, e.g. the model in a setting. It is entered again for each turn,
                because the turns between may need another one.
        """
        job = _Job(work, inside)
        with self._lock:
            self._num_jobs += 1
        self._submit(job)

        try:
            while value := job.produced.get():
                yield value[0]
        finally:
            job.reader_left.set()

        # The error was raised in the other thread. Raise it here again.
        if job.error is not None:
            raise job.error

    def run_alone(self, work: Callable[[], T]) -> T:
        """Call `work` in the model's thread, and return its result.

        Raises:
            UserError: the thread was stopped.
        """

        def once(_: object) -> Iterator[T]:
            yield work()

        with closing(self.stream(once)) as values:
            for value in values:
                return value
        raise UserError("This page is about to end, so the model does not answer any more.")

    def stop(self) -> None:
        """End all work at the next value, so that the command can end."""
        # Do not wait for the thread, and cancel nothing: each job that waits must get its end mark.
        self._stopped.set()
        self._thread.shutdown(wait=False)

    def _submit(self, job: _Job) -> None:
        """Let a job wait for its next turn, behind all other jobs."""
        try:
            self._thread.submit(self._take_turn, job)
        except RuntimeError:
            # The thread was stopped.
            self._end(job)

    def _take_turn(self, job: _Job) -> None:
        """Give a job its next turn, in the model's thread."""
        goes_on = False
        try:
            with job.inside() as context:
                if job.iterator is None:
                    job.iterator = job.work(context)
                goes_on = self._produce(job)
        except BaseException as error:
            # The reader raises it. This thread goes on for all others.
            job.error = error

        if goes_on:
            self._submit(job)
        else:
            self._end(job)

    def _produce(self, job: _Job) -> bool:
        """Produce the values of a turn. Returns whether there may be more."""
        assert job.iterator is not None
        num_values = 0
        while not job.reader_left.is_set() and not self._stopped.is_set():
            # A job that is alone has nobody to make way for.
            if num_values >= VALUES_PER_TURN and self._num_jobs > 1:
                return True

            try:
                value = next(job.iterator)
            except StopIteration:
                return False
            job.produced.put((value,))
            num_values += 1
        return False

    def _end(self, job: _Job) -> None:
        """Close a job, and mark the end of its values: without the mark, its reader waits for ever."""
        if isinstance(job.iterator, Generator):
            job.iterator.close()
        with self._lock:
            self._num_jobs -= 1
        job.produced.put(())
