"""Rounds that do not stand: what is tried instead, when the run gives up, and what it says of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.search.ledger import Ledger
from pbd_ray.search.state import Model, Summary
from pbd_ray.search.verify import verify

JUDGED = {"max_drops": 2, "tolerance": 0.99}
"""Only a model that finds nothing at all is inferior."""
ORDER = [1, 3, 2, 0]
"""The blocks of the teacher, that which hurts least first."""


def without_1(model: Model, video: str, label: int) -> bool:
    return model.kept_blocks == (0, 2, 3)


def three_blocks(model: Model, video: str, label: int) -> bool:
    return len(model.kept_blocks) == 3


def results(summary: Summary) -> list[str]:
    return [record.result for record in (summary.teacher, *summary.rounds)]


def dropped(summary: Summary) -> list[int]:
    return [record.decision.dropped_block for record in summary.rounds if record.decision is not None]


def read_summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def test_the_runner_up_goes(tmp_path: Path, make_world) -> None:
    world = make_world({"experiment__stopping": JUDGED}, spoilt=without_1)
    summary = world.run(str(tmp_path))
    assert dropped(summary) == [1, 3, 1]
    assert summary.stop_reason == "dropped 2 of at most 2 blocks"
    first, second, third = (record.decision for record in summary.rounds)
    assert [one.kept_blocks for one in (first, second, third)] == [(0, 2, 3), (0, 1, 2), (0, 2)]
    assert second.scores == first.scores
    assert [task.name for task in world.tasks if task.candidates] == ["round-01-scores", "round-03-scores"]
    # Round 2 takes its block from the teacher, as it was; round 3 from what round 2 made of it.
    assert [float(task.student.weights["backbone.blocks.0.w"][0]) for task in world.aligned] == pytest.approx(
        [0.9, 0.9, 0.9 * 1.1]
    )
    assert [task.prior for task in world.aligned] == [None, None, 1e-4]
    # The chain of results is that of the attempts.
    assert [task.parent_result for task in world.aligned] == results(summary)[:3]
    assert [record.parent for record in summary.rounds] == results(summary)[:3]
    assert verify(str(tmp_path)) == []
    # What was rolled back stays as evidence, its model and its interval on the test videos too.
    assert Ledger.existing(str(tmp_path)).round(1).read_bundle() is not None
    stored = read_summary(tmp_path)
    assert [entry["interval"]["difference"] == -1 for entry in stored["rounds"]] == [True, False, False]
    assert stored["drops"] == [3, 1]
    assert [entry["standing"] for entry in stored["rounds"]] == [False, True, True]
    assert [entry["rolled_back"] is None for entry in stored["rounds"]] == [False, True, True]
    reason = stored["rounds"][0]["rolled_back"]
    assert reason.startswith("inferior on selection videos: mAP less the teacher's -1.0000 [")
    assert f"round 1: rolled back, {reason}" in world.lines
    assert "round 2: drop block 3, the runner-up of 1" in world.lines


def test_running_again_decides_the_same(tmp_path: Path, make_world) -> None:
    first = make_world({"experiment__stopping": JUDGED}, spoilt=without_1).run(str(tmp_path))
    world = make_world({"experiment__stopping": JUDGED})
    again = world.run(str(tmp_path))
    assert results(again) == results(first)
    assert (world.tasks, world.aligned, again.stop_reason) == ([], [], first.stop_reason)


@pytest.mark.parametrize(
    ("runner_ups", "tried", "why"),
    [
        (0, 1, "removal of block 1, inferior on selection videos: the student no longer recovers "),
        (1, 2, "removal of block 1, then 3, each inferior on selection videos: "),
        (2, 3, "removal of block 1, then 3, then 2, each inferior on selection videos: "),
        (9, 4, "removal of block 1, then 3, then 2, then 0, each inferior on selection videos: "),
    ],
)
def test_giving_up(tmp_path: Path, make_world, runner_ups: int, tried: int, why: str) -> None:
    rules = JUDGED | {"runner_ups": runner_ups}
    world = make_world({"experiment__stopping": rules}, spoilt=three_blocks)
    summary = world.run(str(tmp_path))
    assert dropped(summary) == ORDER[:tried]
    end = "(no other candidate is left)" if tried == len(ORDER) else f"(stopping.runner_ups {runner_ups})"
    assert summary.stop_reason.startswith(why)
    assert summary.stop_reason.endswith(end)
    assert read_summary(tmp_path)["drops"] == []
    assert len([task for task in world.tasks if task.candidates]) == 1
    assert verify(str(tmp_path)) == []


def test_runner_ups_are_counted_anew_at_every_depth(tmp_path: Path, make_world) -> None:
    def fails(model: Model, video: str, label: int) -> bool:
        return model.kept_blocks in ((0, 2, 3), (0, 2))

    world = make_world({"experiment__stopping": JUDGED}, spoilt=fails)
    summary = world.run(str(tmp_path))
    assert dropped(summary) == [1, 3, 1, 2]
    assert [len(record.decision.kept_blocks) for record in summary.rounds] == [3, 3, 2, 2]
    assert read_summary(tmp_path)["drops"] == [3, 2]
    assert summary.stop_reason == "dropped 2 of at most 2 blocks"


def test_given_blocks_have_no_runner_up(tmp_path: Path, make_world) -> None:
    changes = {"experiment__stopping": JUDGED, "experiment__scoring": {"drops": [1, 0]}}
    summary = make_world(changes, spoilt=without_1).run(str(tmp_path))
    assert dropped(summary) == [1]
    assert summary.stop_reason.endswith("the student no longer recovers (no other candidate is left)")


def test_what_racing_stopped_is_not_tried(tmp_path: Path, make_world, make_videos) -> None:
    changes = {
        "experiment__stopping": JUDGED | {"runner_ups": 9},
        "experiment__scoring__racing__min_videos": 5,
    }
    world = make_world(changes, spoilt=three_blocks)
    world.split = type(world.split)(make_videos("fit", 24, 1), world.split.selection, world.split.test)
    summary = world.run(str(tmp_path))
    stopped = {score.block for score in summary.rounds[0].decision.scores if score.stopped}
    assert stopped
    assert set(dropped(summary)) == set(ORDER) - stopped


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({"target_macs_ratio": 0.85}, "MACs are 0.8000"),
        ({"target_latency_ratio": 0.8}, "latency is 0.7500"),
        ({"max_drops": 1}, "dropped 1 of at most 1"),
    ],
)
def test_targets_are_of_models_that_stand(tmp_path: Path, make_world, target, reason: str) -> None:
    world = make_world({"experiment__stopping": JUDGED | target}, spoilt=without_1)
    summary = world.run(str(tmp_path))
    assert dropped(summary) == [1, 3]
    assert reason in summary.stop_reason


def test_undecided_goes_on(tmp_path: Path, make_world) -> None:
    def but_in_one_video(model: Model, video: str, label: int) -> bool:
        return model.kept_blocks == (0, 2, 3) and video != "selection_01"

    world = make_world({"experiment__stopping": JUDGED}, spoilt=but_in_one_video)
    summary = world.run(str(tmp_path))
    assert dropped(summary) == [1, 3]
    first, second = read_summary(tmp_path)["rounds"]
    assert first["selection_interval"]["verdict"] == "undecided"
    assert (first["standing"], first["rolled_back"], first["undecided"]) == (True, None, True)
    assert (second["standing"], second["undecided"]) == (True, False)
    flags = [line for line in world.lines if "undecided" in line]
    assert len(flags) == 1
    assert flags[0].startswith("round 1: stands, undecided on selection videos: mAP less the teacher's -")


def no_jump(model: Model, video: str, label: int) -> bool:
    return model.kept_blocks == (0, 2, 3) and label == 0


@pytest.mark.parametrize(
    ("rail", "spoilt", "evidence"),
    [
        ({"max_class_loss": 0.95}, no_jump, ": AP of jump -1.0000 [-1.0000, -1.0000], limit 0.95"),
        ({"max_false_negative_rise": 0.95}, without_1, "share missed of length S +1.0000 [+1.0000, +1.0000]"),
    ],
)
def test_a_broken_guard_rolls_back(tmp_path: Path, make_world, rail, spoilt, evidence: str) -> None:
    """Without a tolerance: of mAP nothing is asked."""
    rules = {"experiment__stopping": {"max_drops": 1, "guardrails": rail}}
    world = make_world(rules, spoilt=spoilt)
    summary = world.run(str(tmp_path))
    assert dropped(summary) == [1, 3]
    assert [task.name for task in world.tasks if task.subset == "selection"] == [
        "teacher-selection",
        "round-01-selection",
        "round-02-selection",
    ]
    first, second = read_summary(tmp_path)["rounds"]
    assert evidence in first["rolled_back"]
    assert first["selection_interval"] is None
    assert second["standing"]
    assert len(second["guards"]) == len(first["guards"]) > 0
    assert verify(str(tmp_path)) == []


def test_killed_in_any_write_of_a_roll_back(tmp_path: Path, make_world, mortal, killed) -> None:
    changes = {"experiment__stopping": JUDGED | {"max_drops": 1, "guardrails": {"max_class_loss": 0.99}}}
    storage = mortal(str(tmp_path / "whole"))
    expected = results(make_world(changes, spoilt=without_1).run(storage))
    begin = storage.writes.index("rounds/01/evaluation.json")
    end = storage.writes.index("rounds/02/alignment.parquet")
    for lifetime in range(begin, end + 2):
        run_dir, world = str(tmp_path / f"{lifetime}"), make_world(changes, spoilt=without_1)
        with pytest.raises(killed):
            world.run(mortal(run_dir, lifetime))
        assert results(world.run(run_dir)) == expected, lifetime
        assert verify(run_dir) == []
        assert max(Counter(world.slices).values()) == 1, f"a slice on disk was scored again: {lifetime}"
