"""Scoring workers without a cluster: simulated time drives the product's own SliceFeed.

The loop is that of `cluster/pool.py`: a worker gets its first slice when it has loaded the models; what has
ended is given before the idle take what may be begun; a dead worker's slice is put back, and another worker
starts in its place. The driver itself takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from pbd_ray.compression.scoring import CANDIDATE_DETECTION_SCHEMA
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.state import Slice, Work

Candidates = tuple[int, ...]
_NO_ROWS = CANDIDATE_DETECTION_SCHEMA.empty_table()


@dataclass(frozen=True)
class Death:
    """A node that goes down; the driver sees it at once."""

    seconds: float
    workers: tuple[int, ...]
    """Places of the workers on it. Those that are starting start anew."""


@dataclass(frozen=True)
class Workers:
    """One place a worker."""

    slowness: tuple[float, ...]
    """At each place, how many times as long a slice takes there as elsewhere."""
    start_seconds: float = 0.0
    """From the start of a worker until it has loaded the models."""
    deaths: tuple[Death, ...] = ()
    replacement_seconds: float = 0.0
    """From a worker's death until another one starts in its place."""


@dataclass(frozen=True)
class Bounds:
    """What no schedule is quicker than, under two sets of rules. Starts and costs of a slice left out."""

    stages_seconds: float
    """Sum over stages of max(work / workers, longest video): stages follow one another. A schedule that
    begins a stage before the last one has ended may be quicker."""
    floor_seconds: float
    """max(work / workers, longest video) over everything that counts: nothing is quicker."""
    work_seconds: float
    """Of the candidates in the race, without what a stopped one still yielded."""


@dataclass(frozen=True)
class _Ended:
    """A worker has loaded the models (no work) or scored a slice."""

    place: int
    life: int
    work: Work | None


def makespan(workers: Workers, feed: SliceFeed, seconds: Callable[[Work], float]) -> float:
    """Seconds from the start of all workers until the feed ends.

    Args:
        seconds: of a slice on a worker that is not slow.
    """
    places = range(min(len(workers.slowness), feed.remaining))  # as the pool: no more than there are slices
    number = count()  # events of one moment come in the order in which they were foreseen
    events: list[tuple[float, int, _Ended | Death]] = [
        *((workers.start_seconds, next(number), _Ended(place, 0, None)) for place in places),
        *((death.seconds, next(number), death) for death in workers.deaths),
    ]
    heapify(events)
    lives = [0] * len(places)
    running: dict[int, Work] = {}
    idle: list[int] = []
    now = 0.0
    while not feed.ended:
        now, _, event = heappop(events)
        if isinstance(event, Death):
            for place in (place for place in event.workers if place in places):
                lives[place] += 1
                if place in running:
                    feed.put_back(running.pop(place))
                if place in idle:
                    idle.remove(place)
                loaded = now + workers.replacement_seconds + workers.start_seconds
                heappush(events, (loaded, next(number), _Ended(place, lives[place], None)))
            continue  # as the pool: who is idle takes what was put back when the next worker is heard of
        if event.life != lives[event.place]:
            continue  # its worker died on the way
        if event.work is not None:
            feed.give(running.pop(event.place), _NO_ROWS)
        idle.append(event.place)
        while idle and (work := feed.take()) is not None:
            place = idle.pop()
            running[place] = work
            ends = now + seconds(work) * workers.slowness[place]
            heappush(events, (ends, next(number), _Ended(place, lives[place], work)))
    return now


def bounds(
    plan: Sequence[Slice],
    raced: Sequence[Candidates],
    seconds: Callable[[Sequence[str], Candidates], Sequence[float]],
    workers: int,
) -> Bounds:
    """Lower bounds of a sweep whose race is known.

    Args:
        raced: for each stage that counts, the candidates in it (`SliceFeed.raced` at the end).
        seconds: of each of some videos, with these candidates.
    """
    stages = []
    for stage, candidates in enumerate(raced):
        names = [name for piece in plan if piece.stage == stage for name in piece.videos]
        stages.append(seconds(names, candidates))
    work, longest = [sum(times) for times in stages], [max(times) for times in stages]
    return Bounds(
        stages_seconds=sum(max(w / workers, video) for w, video in zip(work, longest, strict=True)),
        floor_seconds=max(sum(work) / workers, *longest),
        work_seconds=sum(work),
    )
