"""One thread that serves many readers in turns."""

import time
from contextlib import contextmanager
from itertools import count, islice
from threading import Thread

import pytest

from scripts.demo.turns import VALUES_PER_TURN, ModelThread
from tests.helpers.errors import refused


@pytest.fixture
def thread():
    thread = ModelThread()
    yield thread
    thread.stop()


def numbers(total, produced):
    """Work that notes each number that it produces."""

    def work(_):
        for number in range(total):
            produced.append(number)
            time.sleep(0.001)
            yield number

    return work


def test_a_long_answer_does_not_hold_up_a_short_one(thread):
    produced = []
    long = thread.stream(numbers(3_000, produced))
    assert next(long) == 0

    # The short work waits for a turn or two of the long one, and then runs to its end.
    before = len(produced)
    assert list(thread.stream(numbers(5, []))) == [0, 1, 2, 3, 4]
    assert len(produced) - before <= 3 * VALUES_PER_TURN

    # The long one goes on where it was.
    assert list(islice(long, 100)) == list(range(1, 101))
    long.close()


def test_readers_have_turns_in_order(thread):
    order = []

    def work_of(name):
        def work(_):
            for _ in range(2 * VALUES_PER_TURN):
                order.append(name)
                time.sleep(0.001)
                yield name

        return work

    streams = [thread.stream(work_of(name)) for name in "abc"]
    readers = [Thread(target=list, args=(stream,)) for stream in streams]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()

    # Once all are there, nobody has two turns before each of the others had one.
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert sorted(order) == sorted("abc" * 2 * VALUES_PER_TURN)
    assert len(turns) >= 4


def test_each_turn_enters_its_context_again(thread):
    entered = []

    def context_of(name):
        @contextmanager
        def inside():
            entered.append(name)
            yield name

        return inside

    # While the first is between two turns, the second is in its own context.
    first = thread.stream(lambda name: (name for _ in count()), context_of("first"))
    assert next(first) == "first"
    second = thread.stream(lambda name: iter([name]), context_of("second"))
    assert list(second) == ["second"]
    assert next(first) == "first"
    first.close()

    # A later job can run only if the context of the others was left.
    assert thread.run_alone(lambda: "done") == "done"
    assert entered[0] == "first" and entered.count("second") == 1 and entered.count("first") > 1


def test_a_reader_who_leaves_ends_the_work(thread):
    produced = []
    reader = thread.stream(numbers(2_000, produced))
    assert next(reader) == 0
    reader.close()

    thread.run_alone(lambda: None)
    num_produced = len(produced)
    time.sleep(0.05)
    assert len(produced) == num_produced < 2_000


def test_an_error_of_the_work_or_its_context_reaches_its_reader_alone(thread):
    def work(_):
        yield 1
        raise ArithmeticError

    reader = thread.stream(work)
    assert next(reader) == 1
    with pytest.raises(ArithmeticError):
        next(reader)
    assert list(thread.stream(lambda _: iter([2]))) == [2]

    @contextmanager
    def inside():
        raise LookupError
        yield

    with pytest.raises(LookupError):
        list(thread.stream(lambda _: iter([1]), inside))


def test_stopping_ends_all_readers_also_those_who_wait():
    thread = ModelThread()
    streams = [thread.stream(lambda _: iter(int, 1)) for _ in range(3)]
    assert next(streams[0]) == 0

    ended = []
    readers = [Thread(target=lambda stream=stream: ended.append(set(stream) <= {0})) for stream in streams]
    for reader in readers:
        reader.start()
    thread.stop()
    for reader in readers:
        reader.join(timeout=10)
    assert ended == [True, True, True]

    # Who comes after the end is not left waiting either.
    assert list(thread.stream(lambda _: iter([1]))) == []
    refused(thread.run_alone, lambda: 1, words=["about to end"])
