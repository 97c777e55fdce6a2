"""Making items ahead of their consumer in background threads: decoding beside compute.

Nothing here knows of videos. A *stream* is a function that starts an iterator: one a video, whose items are
batches. When things happen depends on timing; what comes out, and in which order, never does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Stream = Callable[[], Iterator[T]]


def ahead(streams: Sequence[Stream[T]], threads: int, depth: int) -> Generator[Iterator[T], None, None]:
    """One iterator a stream, in order, whose items were made before they are asked for.

    At most `threads` + `depth` items, over all streams, are begun and not yet handed out. One thread runs a
    stream from begin to end: a video decoder must stay in the thread that opened it. With 0 threads every
    item is made when it is asked for, by who asks.

    Asking for the next iterator ends the one before; what was left of its stream is thrown away. Close the
    generator if it may not be read to its end (`contextlib.closing`): that ends all threads, and waits for
    the items they are at.

    Raises:
        What a stream raises: its iterator raises it, after the items that came before.
    """
    if threads == 0:
        for stream in streams:
            with closing(_inline(stream)) as items:
                yield items
        return
    shelf = _Shelf(streams, threads + depth)
    workers = [
        # Daemons: a generator that nobody closes must not keep the process from ending.
        threading.Thread(target=shelf.fill, name=f"ahead-{number}", daemon=True)
        for number in range(min(threads, len(streams)))
    ]
    for worker in workers:
        worker.start()
    try:
        for index in range(len(streams)):
            shelf.turn_to(index)
            yield shelf.items(index)
    finally:
        shelf.turn_to(len(streams))
        for worker in workers:
            worker.join()


def _inline(stream: Stream[T]) -> Generator[T, None, None]:
    yield from stream()


@dataclass(frozen=True, eq=False)
class _End:
    """Comes after a stream's last item."""

    error: BaseException | None = None


def _outcomes(stream: Stream[T]) -> Iterator[T | _End]:
    try:
        yield from stream()
    except GeneratorExit:  # thrown away
        raise
    except BaseException as error:  # whatever it is, a consumer waits for it
        yield _End(error)
    else:
        yield _End()


class _Shelf(Generic[T]):
    """Where threads put items and the consumer, who is at stream `current`, takes them.

    `live` counts the items begun and not taken. The last place is kept for the current stream: those after
    it cannot fill the shelf while the consumer waits, so nobody waits for ever.
    """

    def __init__(self, streams: Sequence[Stream[T]], places: int) -> None:
        self._streams, self._places = streams, places
        self._ready: list[deque[T | _End]] = [deque() for _ in streams]
        self._untouched = iter(range(len(streams)))  # one for all threads
        self._current = self._live = 0
        self._changed = threading.Condition()

    def fill(self) -> None:
        """The work of a thread: stream after stream, until none is left that the consumer may want."""
        for index in self._untouched:
            outcomes = _outcomes(self._streams[index])
            while self._begin(index) and self._put(index, next(outcomes)):
                pass

    def turn_to(self, current: int) -> None:
        """The consumer leaves the streams before `current`."""
        with self._changed:
            for ready in self._ready[self._current : current]:
                self._live -= sum(not isinstance(outcome, _End) for outcome in ready)
                ready.clear()
            self._current = current
            self._changed.notify_all()

    def items(self, index: int) -> Iterator[T]:
        while self._has_item(index):
            yield self._take(index)  # no variable here holds on to what was handed out

    def _begin(self, index: int) -> bool:
        """Wait for a place for the next item of a stream; False where the consumer has left it."""
        with self._changed:
            self._changed.wait_for(
                lambda: index < self._current or self._live < self._places - (index > self._current)
            )
            if index < self._current:
                return False
            self._live += 1
            return True

    def _put(self, index: int, outcome: T | _End) -> bool:
        """Whether the stream goes on."""
        with self._changed:
            left, end = index < self._current, isinstance(outcome, _End)
            if not left:
                self._ready[index].append(outcome)
            if left or end:  # no item
                self._live -= 1
            self._changed.notify_all()
            return not (left or end)

    def _has_item(self, index: int) -> bool:
        """Wait for the next item of a stream; False where it has ended or the consumer has left it."""
        with self._changed:
            self._changed.wait_for(lambda: index < self._current or self._ready[index])
            if index < self._current:
                return False
            first = self._ready[index][0]
        if isinstance(first, _End) and first.error is not None:
            raise first.error
        return not isinstance(first, _End)

    def _take(self, index: int) -> T:
        with self._changed:
            self._live -= 1
            self._changed.notify_all()
            outcome = self._ready[index].popleft()
        assert not isinstance(outcome, _End)
        return outcome
