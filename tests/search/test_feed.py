"""Slices in stages: who may be handed out when, and who is judged on what."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pbd_ray.config import UserError
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.state import Slice, Work

ROWS = pa.table({"video": ["x"]})
PLAN = tuple(
    Slice(index, tuple(f"v{index}{n}" for n in range(size)), stage)
    for index, (size, stage) in enumerate([(1, 0), (1, 0), (2, 1), (2, 1), (4, 2), (4, 2), (2, 3)])
)


class Driver:
    """A feed whose judge follows a script, and what came of it."""

    def __init__(self, verdicts: dict[int, tuple[int, ...]] | None, done: tuple[int, ...] = ()) -> None:
        self.kept: list[int] = []
        self.judged: list[tuple[int, tuple[int, ...]]] = []
        self.verdicts = verdicts

        def judge(stage: int, alive: tuple[int, ...]) -> tuple[int, ...]:
            self.judged.append((stage, alive))
            return (verdicts or {}).get(stage, alive)

        self.feed = SliceFeed(
            PLAN, (0, 1, 2), done, lambda work, table: self.kept.append(work.piece.index),
            judge if verdicts is not None else None,
        )  # fmt: skip

    def take(self, *indices: int) -> list[Work]:
        taken = [self.feed.take() for _ in indices]
        assert [work and work.piece.index for work in taken] == list(indices)
        return [work for work in taken if work is not None]

    def give(self, *works: Work) -> None:
        for work in works:
            self.feed.give(work, ROWS)


def test_one_at_a_time() -> None:
    """Whoever works alone meets every barrier before it goes on."""
    driver = Driver({0: (0, 2), 1: (0, 2)})
    seen = []
    while (work := driver.feed.take()) is not None:
        seen.append((work.piece.index, work.candidates))
        driver.give(work)
    all_, two = (0, 1, 2), (0, 2)
    assert seen == [(0, all_), (1, all_), (2, two), (3, two), (4, two), (5, two), (6, two)]
    assert driver.kept == [0, 1, 2, 3, 4, 5, 6]
    assert driver.judged == [(0, all_), (1, two), (2, two)]  # none after the last stage
    assert driver.feed.ended
    assert driver.feed.raced == [all_, two, two, two]
    assert driver.feed.alive == two


def test_the_idle_begin_the_next_stage_and_no_further() -> None:
    driver = Driver({0: (1, 2)})
    first, second, ahead, further = driver.take(0, 1, 2, 3)
    assert further.candidates == (0, 1, 2)
    assert driver.feed.take() is None
    assert not driver.feed.ended
    driver.give(ahead, first)
    assert driver.judged == [], "a stage is judged when all of it is there"
    driver.give(second)
    assert driver.judged == [(0, (0, 1, 2))]
    (later,) = driver.take(4)
    assert later.candidates == (1, 2)
    driver.give(further)
    assert driver.judged == [(0, (0, 1, 2)), (1, (1, 2))]


def test_the_last_candidate_ends_the_sweep() -> None:
    driver = Driver({1: (2,)})
    driver.give(*driver.take(0, 1))
    late, *rest = driver.take(2, 3, 4)
    driver.give(late)
    assert driver.feed.remaining == 4
    driver.give(*rest[:1])
    assert driver.feed.ended
    assert (driver.feed.alive, driver.feed.raced) == ((2,), [(0, 1, 2), (0, 1, 2)])
    assert driver.feed.take() is None
    assert driver.feed.remaining == 0
    driver.give(rest[1])
    assert driver.feed.ended


def test_what_was_put_back_is_next_and_what_is_given_twice_counts_once() -> None:
    driver = Driver({})
    first, second = driver.take(0, 1)
    driver.feed.put_back(first)
    (again,) = driver.take(0)
    driver.give(again, first, second, second)
    assert driver.kept == [0, 1]
    assert driver.judged == [(0, (0, 1, 2))]


@pytest.mark.parametrize("done", [(0,), (0, 1), (0, 1, 3), (0, 1, 2, 3), tuple(range(7))])
def test_what_is_on_record_is_judged_again_and_not_scored(done: tuple[int, ...]) -> None:
    whole, resumed = (Driver({0: (0, 1), 2: (1, 0)}, done=already) for already in ((), done))
    for driver in (whole, resumed):
        while (work := driver.feed.take()) is not None:
            driver.give(work)
    assert sorted(resumed.kept) == sorted(set(range(7)) - set(done))
    assert resumed.judged == whole.judged
    assert (resumed.feed.raced, resumed.feed.alive) == (whole.feed.raced, whole.feed.alive)


def test_share_seen() -> None:
    driver = Driver({}, done=(0,))
    assert driver.feed.seen == pytest.approx(1 / 16)
    driver.give(*driver.take(1, 2))
    assert driver.feed.seen == pytest.approx(4 / 16)


def test_without_a_judge_all_candidates_see_all_stages() -> None:
    driver = Driver(None)
    while (work := driver.feed.take()) is not None:
        assert work.candidates == (0, 1, 2)
        driver.give(work)
    assert driver.feed.raced == [(0, 1, 2)] * 4


def test_nothing_to_do() -> None:
    feed = SliceFeed((), (), (), lambda work, table: None)
    assert (feed.ended, feed.take(), feed.remaining) == (True, None, 0)


def test_a_slice_that_cannot_be_scored() -> None:
    """It ends the sweep, or, where somebody asked to be told, only itself."""
    error = UserError("v00: damaged")
    strict = Driver(None)
    (work,) = strict.take(0)
    with pytest.raises(UserError, match="v00: damaged"):
        strict.feed.refuse(work, error)
    assert not strict.feed.ended
    kept: list[int] = []
    lost: list[tuple[int, UserError]] = []
    feed = SliceFeed(
        PLAN[:2], (), (), lambda work, table: kept.append(work.piece.index),
        lost=lambda work, error: lost.append((work.piece.index, error)),
    )  # fmt: skip
    first, second = feed.take(), feed.take()
    assert first is not None and second is not None
    feed.refuse(first, error)
    assert (feed.ended, feed.remaining) == (False, 1)
    feed.give(second, ROWS)
    assert (kept, lost, feed.ended) == ([1], [(0, error)], True)
