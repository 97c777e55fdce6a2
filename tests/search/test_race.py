"""Racing inside the round loop: fewer candidates are scored, nothing else changes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.config import ConfigError, GridConfig, load_recipe
from pbd_ray.search.race import videos_by_stage, videos_of_arms
from pbd_ray.search.slices import plan_stages, race_order
from pbd_ray.search.state import UNDROPPED, Decision, Slice, Summary
from pbd_ray.search.verify import verify

GRID = GridConfig(window_frames=64, feature_steps=64)
RACE = {"experiment__scoring__racing__min_videos": 5}


@pytest.fixture
def make_race(make_world, make_videos):
    """A world with 24 fit videos, in which the race has stages of 5, 5, 10 and 4 videos."""

    def make(changes: dict[str, Any] | None = None, **fields: Any):
        world = make_world(RACE | (changes or {}), **fields)
        world.split = replace(world.split, fit=make_videos("fit", 24, 1))
        return world

    return make


def decisions(summary: Summary) -> list[Decision]:
    return [record.decision for record in summary.rounds if record.decision is not None]


def results(summary: Summary) -> list[str]:
    return [record.result for record in (summary.teacher, *summary.rounds)]


def test_the_choice_is_that_of_exhaustive_scoring(tmp_path: Path, make_race) -> None:
    raced, whole = make_race(), make_race({"experiment__scoring__racing": False})
    ours = decisions(raced.run(str(tmp_path / "race")))
    theirs = decisions(whole.run(str(tmp_path / "whole")))
    assert [decision.dropped_block for decision in ours] == [d.dropped_block for d in theirs]
    assert raced.forks < 0.6 * whole.forks
    first = ours[0]
    by_block = {score.block: score for score in first.scores}
    losers = [score for score in first.scores if score.stopped]
    assert losers
    assert all(score.videos in (5, 10, 20) for score in losers)
    assert (
        by_block[UNDROPPED].videos
        == by_block[first.dropped_block].videos
        == max(score.videos for score in first.scores)
    )
    for score in losers:
        assert 0 < score.behind_low <= score.behind <= score.behind_high
    assert all(not score.stopped and score.videos == 24 for score in theirs[0].scores)
    assert (by_block[first.dropped_block].behind, by_block[UNDROPPED].behind) == (None, None)


@pytest.mark.parametrize("criterion", ["map", "train_loss"])
def test_race_does_not_depend_on_slices_or_the_order_in_which_they_end(
    tmp_path: Path, make_race, criterion: str
) -> None:
    changes = {"experiment__scoring__criterion": criterion}
    expected = results(make_race(changes).run(str(tmp_path / "a")))
    fine = make_race(changes | {"execution__max_workers": 5, "execution__slices_per_worker": 3})
    assert results(fine.run(str(tmp_path / "b"))) == expected
    crowd = make_race(changes)

    def several_at_once(task, feed):
        """Every worker takes a slice before any gives one back: stages are begun before their barrier."""
        part = getattr(crowd.split, task.subset)
        while not feed.ended:
            taken = []
            while (work := feed.take()) is not None:
                taken.append(work)
            for work in reversed(taken):
                rows = crowd.rows(replace(task, candidates=work.candidates), part.select(work.piece.videos))
                feed.give(work, rows)
        return {}

    crowd.sweep = several_at_once
    assert results(crowd.run(str(tmp_path / "c"))) == expected
    assert verify(str(tmp_path / "c")) == []


def test_killed_in_any_write_of_a_race(tmp_path: Path, make_race, mortal, killed) -> None:
    changes = {"experiment__stopping": {"max_drops": 1}}
    storage = mortal(str(tmp_path / "whole"))
    expected = results(make_race(changes).run(storage))
    writes = [place for place, name in enumerate(storage.writes) if name.startswith("rounds/01/scores")]
    assert len(writes) > 8
    for lifetime in (*writes, writes[-1] + 1):
        run_dir, world = str(tmp_path / f"{lifetime}"), make_race(changes)
        with pytest.raises(killed):
            world.run(mortal(run_dir, lifetime))
        assert results(world.run(run_dir)) == expected, lifetime
        assert max(Counter(world.slices).values()) == 1, f"a slice on disk was scored again: {lifetime}"


def test_those_who_watch_see_every_barrier(tmp_path: Path, make_race) -> None:
    world = make_race({"experiment__stopping": {"max_drops": 1}})
    summary = world.run(str(tmp_path))
    told = [(scores, final) for name, scores, final in world.told if name == "round-01-scores"]
    assert [final for _, final in told] == [False] * (len(told) - 1) + [True]
    stopped = [sum(score.stopped for score in scores) for scores, _ in told]
    assert sum(stopped[:-1]) == stopped[-1] > 0
    lines = [line for line in world.lines if "race stops" in line]
    assert lines[0].startswith("round 1: race stops ")
    assert "after 5 of 24 videos" in lines[0]
    stored = json.loads((tmp_path / "summary.json").read_text())["rounds"][0]
    dropped = str(summary.rounds[0].decision.dropped_block)
    assert not stored["candidates"][dropped]["stopped"]
    assert any(entry["stopped"] for entry in stored["candidates"].values())


def test_near_ties_are_said(tmp_path: Path, make_race) -> None:
    world = make_race({"experiment__scoring__delta": 0.9, "experiment__scoring__racing": None})
    world.run(str(tmp_path))
    line = next(line for line in world.lines if "drop block" in line)
    assert line == "round 1: drop block 1 (a tie with blocks 0, 2, 3, within 0.9: the best score decides)"


def test_mse_is_not_raced(tmp_path: Path, make_race) -> None:
    world = make_race({"experiment__scoring__criterion": "mse"})
    summary = world.run(str(tmp_path))
    assert all(score.videos == 24 for score in decisions(summary)[0].scores)


def test_order_is_drawn_by_seed_and_round(make_videos) -> None:
    videos = make_videos("fit", 30, 0).videos
    order = race_order(videos, seed=1, round=1)
    assert sorted(video.id for video in order) == sorted(video.id for video in videos)
    assert race_order(videos[::-1], seed=1, round=1) == order
    others = [race_order(videos, seed=1, round=2), race_order(videos, seed=2, round=1)]
    assert all(other != order for other in others)


def test_stages_hold_the_videos_between_their_cuts(make_videos) -> None:
    videos = race_order(make_videos("fit", 30, 0).videos, 0, 1)
    plan = plan_stages(videos, (5, 10, 20), GRID, 4)
    assert [piece.index for piece in plan] == list(range(len(plan)))
    for stage, (begin, end) in enumerate([(0, 5), (5, 10), (10, 20), (20, 30)]):
        names = sorted(name for piece in plan if piece.stage == stage for name in piece.videos)
        assert names == sorted(video.id for video in videos[begin:end])
        assert sum(piece.stage == stage for piece in plan) == 4
        assert videos_by_stage(plan)[stage] == tuple(sorted(video.id for video in videos[:end]))
    assert {piece.stage for piece in plan_stages(videos, (), GRID, 4)} == {0}


def test_every_arm_counts_on_the_stages_it_was_in() -> None:
    plan = (Slice(0, ("b",)), Slice(1, ("a",)), Slice(2, ("d",), 1), Slice(3, ("c",), 2), Slice(4, ("e",), 3))
    arms = videos_of_arms(plan, [(0, 4, 7), (0, 4), (4, 0)], (0, 4, 7), undropped=True)
    assert arms == {
        0: ("a", "b", "c", "d"),
        4: ("a", "b", "c", "d"),
        7: ("a", "b"),
        UNDROPPED: ("a", "b", "c", "d"),
    }
    assert UNDROPPED not in videos_of_arms(plan, [(0,)], (0,), undropped=False)


@pytest.mark.parametrize(("text", "on"), [("off", False), ("on", True), ("null", False), ("false", False)])
def test_on_and_off(text: str, on: bool) -> None:
    scoring = load_recipe("demo", [f"scoring.racing={text}"]).experiment.scoring
    assert (scoring.racing is not None) == on


def test_a_wrong_word_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"demo: experiment.scoring.racing"):
        load_recipe("demo", ["scoring.racing=maybe"])
