from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest

from pbd_ray.data.ahead import ahead

LENGTHS = [(), (0,), (3,), (1, 1, 1, 1, 1), (0, 0, 4), (2, 0, 7, 1, 0), (9, 1, 1, 1, 9), (0, 3, 0, 0, 0, 2)]
THREADS = [0, 1, 2, 3, 8]
PATIENCE_SECONDS = 60
"""How long a test waits for what must happen before it fails."""


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


def numbered(stream: int, length: int) -> Callable[[], Iterator[tuple[int, int]]]:
    return lambda: iter([(stream, item) for item in range(length)])


def streams_of(lengths: Sequence[int]) -> list[Callable[[], Iterator[tuple[int, int]]]]:
    return [numbered(stream, length) for stream, length in enumerate(lengths)]


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_all_items_in_order(lengths: tuple[int, ...], threads: int, depth: int) -> None:
    found = [list(items) for items in ahead(streams_of(lengths), threads, depth)]
    assert found == [[(stream, item) for item in range(length)] for stream, length in enumerate(lengths)]


@pytest.mark.parametrize("slow", range(3))
def test_order_does_not_depend_on_timing(slow: int) -> None:
    """A stream that makes nothing before the others have made all they may."""
    others = threading.Semaphore(0)

    def stream(index: int) -> Iterator[tuple[int, int]]:
        for item in range(2):
            if index == slow:
                for _ in range(2 - item):
                    assert others.acquire(timeout=PATIENCE_SECONDS)
            else:
                others.release()
            yield index, item

    made = [lambda index=index: stream(index) for index in range(3)]
    found = [list(items) for items in ahead(made, threads=3, depth=4)]
    assert found == [[(index, 0), (index, 1)] for index in range(3)]


@pytest.mark.parametrize("threads", THREADS)
def test_a_stream_runs_in_one_thread(threads: int) -> None:
    """From opening to closing; never the consumer's, unless there is no other."""
    seen: list[set[threading.Thread]] = [set() for _ in range(5)]

    def stream(index: int) -> Iterator[int]:
        try:
            for item in range(4):
                seen[index].add(threading.current_thread())
                yield item
        finally:
            seen[index].add(threading.current_thread())

    made = [lambda index=index: stream(index) for index in range(5)]
    with closing(ahead(made, threads, 1)) as outer:
        for index, items in enumerate(outer):
            assert next(items) == 0
            if index % 2:
                assert list(items) == [1, 2, 3]
    assert [len(threads_of_one) for threads_of_one in seen] == [1] * 5
    assert all((threading.current_thread() in one) == (threads == 0) for one in seen)


class Counter:
    """Items begun and not yet handed out, and the most there have been."""

    def __init__(self, bound: int) -> None:
        self.lock, self.bound, self.now, self.most = threading.Lock(), bound, 0, 0
        self.full = threading.Event()

    def add(self, change: int) -> None:
        with self.lock:
            self.now += change
            self.most = max(self.most, self.now)
            if self.now >= self.bound:
                self.full.set()
            else:
                self.full.clear()


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(30,), (7, 7, 7, 7, 7), (1,) * 30, (2, 0, 20, 1, 0, 9)], ids=str)
def test_bound(lengths: tuple[int, ...], threads: int, depth: int) -> None:
    """Never more than threads + depth at a time, and that many in a long stream whose consumer is slow."""
    counter = Counter(threads + depth)

    def stream(index: int, length: int) -> Iterator[tuple[int, int]]:
        for item in range(length):
            counter.add(1)
            yield index, item

    made = [lambda index=i, length=length: stream(index, length) for i, length in enumerate(lengths)]
    for index, items in enumerate(ahead(made, threads, depth)):
        for item in range(lengths[index]):
            counter.add(-1)  # before it is asked for, as its place may be taken before we hear of it
            assert next(items) == (index, item)
            if lengths[index] - item > counter.bound:
                assert counter.full.wait(PATIENCE_SECONDS)
        assert next(items, None) is None
    assert counter.most <= counter.bound and counter.now == 0


@dataclass(frozen=True)
class Item:
    """What a weak reference may point to."""

    stream: int
    number: int


class Alive:
    """Makes items and knows which of them are still held by somebody."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Item]] = []

    def item(self, stream: int, number: int) -> Item:
        item = Item(stream, number)
        self.made.append(weakref.ref(item))
        return item

    def items(self) -> list[Item]:
        return [item for ref in self.made if (item := ref()) is not None]


def test_what_was_handed_out_is_let_go() -> None:
    """Nothing but the consumer holds an item that it has."""
    alive, at_the_next = Alive(), threading.Event()

    def stream() -> Iterator[Item]:
        yield alive.item(0, 0)
        at_the_next.set()

    for items in ahead([stream], threads=1, depth=1):
        item = next(items)
        assert at_the_next.wait(PATIENCE_SECONDS)
        assert alive.items() == [item]
        del item
        assert alive.items() == []


class Damaged(Exception):
    pass


def failing(stream: int, length: int, error: BaseException) -> Callable[[], Iterator[tuple[int, int]]]:
    def make() -> Iterator[tuple[int, int]]:
        yield from numbered(stream, length)()
        raise error

    return make


def refusing() -> Iterator[Any]:
    raise Damaged("at its opening")


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("kind", [Damaged, KeyboardInterrupt])
def test_a_failure_comes_in_its_place(threads: int, length: int, kind: type[BaseException]) -> None:
    """After all items before it, whenever it happened."""
    streams = [numbered(0, 3), failing(1, length, kind("frame 7")), refusing, numbered(3, 2)]
    found: list[Any] = []
    with closing(ahead(streams, threads, 2)) as outer:
        found += next(outer)
        damaged = next(outer)
        found += [next(damaged) for _ in range(length)]
        with pytest.raises(kind, match="frame 7"):
            next(damaged)
        with pytest.raises(Damaged, match="at its opening"):
            next(next(outer))
        found += next(outer)
        assert next(outer, None) is None
    assert found == [(0, 0), (0, 1), (0, 2), *((1, item) for item in range(length)), (3, 0), (3, 1)]


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_consumer_that_stops_leaves_nothing_running(threads: int, taken: int) -> None:
    """By an error of its own, in the middle of a stream; streams that were running are closed."""
    opened, closed = [], []

    def endless(index: int) -> Iterator[int]:
        opened.append(index)
        try:
            while True:
                yield index
        finally:
            closed.append(index)

    made = [lambda index=index: endless(index) for index in range(6)]

    def consume() -> None:
        with closing(ahead(made, threads, 3)) as outer:
            items = next(outer)
            for _ in range(taken):
                assert next(items) == 0
            raise Damaged("the consumer")

    with pytest.raises(Damaged, match="the consumer"):
        consume()
    assert sorted(closed) == sorted(opened)
    ahead(made, threads, 3).close()  # never started


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("taken", [0, 1, 2])
def test_an_iterator_that_is_left_is_thrown_away(threads: int, taken: int) -> None:
    """Also one that would never end; what lay ready of it gives its places back."""
    alive, one_is_ready = Alive(), [threading.Event() for _ in range(7)]

    def endless(index: int) -> Iterator[Item]:
        for number in itertools.count():
            if number == taken + 1:
                one_is_ready[index].set()
            yield alive.item(index, number)

    made = [lambda index=index: endless(index) for index in range(7)]
    left: list[Iterator[Item]] = []
    with closing(ahead(made, threads, 2)) as outer:
        for index, items in enumerate(outer):
            assert all(next(items) == Item(index, number) for number in range(taken))
            if threads == 1:  # with more, later streams may have the places
                assert one_is_ready[index].wait(PATIENCE_SECONDS)
            assert all(next(others, None) is None for others in left)
            left.append(items)
    assert len(left) == 7 and alive.items() == []


def test_an_item_whose_stream_is_left_while_it_is_made() -> None:
    """It is thrown away, and gives its place back."""
    alive = Alive()
    begun, left = ([threading.Event() for _ in range(7)] for _ in range(2))

    def stream(index: int) -> Iterator[Item]:
        yield alive.item(index, 0)
        begun[index].set()
        assert left[index].wait(PATIENCE_SECONDS)
        yield alive.item(index, 1)

    made = [lambda index=index: stream(index) for index in range(7)]
    iterators = []
    for index, items in enumerate(ahead(made, threads=2, depth=0)):
        if index:
            left[index - 1].set()
        assert next(items) == Item(index, 0)
        assert begun[index].wait(PATIENCE_SECONDS)
        if index == 6:
            left[index].set()
        iterators.append(items)
    assert len(alive.made) == 14 and alive.items() == []


def test_without_threads_nothing_is_made_ahead() -> None:
    made: list[int] = []

    def stream() -> Iterator[int]:
        for item in range(3):
            made.append(item)
            yield item

    for items in ahead([stream, stream], 0, 4):
        before = len(made)
        assert next(items) == 0
        assert len(made) == before + 1


def test_streams_are_made_ahead_across_their_borders() -> None:
    """While the consumer is at the first item, the next streams' items are made."""
    begun = [threading.Event() for _ in range(4)]

    def stream(index: int) -> Iterator[int]:
        begun[index].set()
        yield index

    made = [lambda index=index: stream(index) for index in range(4)]
    for index, items in enumerate(ahead(made, threads=1, depth=1)):
        assert next(items) == index
        if index < 3:
            assert begun[index + 1].wait(PATIENCE_SECONDS)
