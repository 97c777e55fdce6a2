from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import fs

from pbd_ray.search.ledger import Ledger, LedgerError
from pbd_ray.search.state import Model, Summary
from pbd_ray.search.storage import TEMPORARY, Storage
from pbd_ray.search.summary import summary_to_json
from pbd_ray.search.verify import verify


def results(summary: Summary) -> list[str]:
    return [record.result for record in (summary.teacher, *summary.rounds)]


def read_summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def test_a_whole_run(tmp_path: Path, make_world) -> None:
    world = make_world()
    summary = world.run(str(tmp_path))
    assert [record.decision.dropped_block for record in summary.rounds] == [1, 3]
    assert summary.stop_reason == "dropped 2 of at most 2 blocks"
    assert summary.bit_exact
    assert verify(str(tmp_path)) == []
    # Every round scores with the aligned weights of the one before, against the uncompressed teacher.
    assert [task.round for task in world.aligned] == [1, 2]
    assert [task.student.kept_blocks for task in world.aligned] == [(0, 2, 3), (0, 2)]
    assert all(task.teacher.kept_blocks == (0, 1, 2, 3) for task in world.aligned)
    assert world.aligned[0].teacher.weights["backbone.blocks.0.w"] == np.float32(0.9)
    assert world.aligned[1].student.weights["backbone.blocks.0.w"] == np.float32(0.9) * np.float32(1.1)
    assert "backbone.blocks.1.w" not in world.aligned[0].student.weights
    assert [task.parent_result for task in world.aligned] == results(summary)[:2]
    assert [task.name for task in world.tasks] == [
        "teacher-evaluation",
        "round-01-scores",
        "round-01-evaluation",
        "round-02-scores",
        "round-02-evaluation",
    ]
    assert [task.candidates for task in world.tasks] == [(), (0, 1, 2, 3), (), (0, 2, 3), ()]
    assert [task.subset for task in world.tasks] == ["test", "fit", "test", "fit", "test"]
    assert all(task.teacher is None for task in world.tasks)


def test_one_shot_aligns_once_after_the_last_drop(tmp_path: Path, make_world) -> None:
    world = make_world({"experiment__alignment__rounds": "last", "experiment__scoring__drops": (3, 1)})
    first, second = world.run(str(tmp_path)).rounds
    assert [task.round for task in world.aligned] == [2]
    assert world.aligned[0].student.kept_blocks == (0, 2)
    assert world.aligned[0].student.weights["backbone.blocks.0.w"] == np.float32(0.9)  # the teacher's own
    assert (first.learning_rate, first.epoch, first.curves.num_rows) == (None, 0, 0)
    assert (second.learning_rate, second.epoch) == (1e-4, 2)


def test_summary(tmp_path: Path, make_world) -> None:
    summary = make_world().run(str(tmp_path))
    stored = read_summary(tmp_path)
    assert stored == json.loads(json.dumps(summary_to_json(summary)))
    assert stored["teacher"]["kept_blocks"] == [0, 1, 2, 3]
    assert stored["teacher"]["macs"] == 500
    assert stored["teacher"]["latency_ms"] == 40.0
    first, second = stored["rounds"]
    assert (first["dropped_block"], first["kept_blocks"], first["lr"]) == (1, [0, 2, 3], 1e-4)
    assert list(first["scores"]) == ["0", "1", "2", "3"]
    assert max(first["scores"], key=first["scores"].get) == "1"
    assert list(second["scores"]) == ["0", "2", "3"]
    assert first["undropped_score"] >= max(first["scores"].values())
    assert list(first["map"]) == ["0.3", "0.4", "0.5", "0.6", "0.7"]
    assert first["average_map"] == pytest.approx(np.mean(list(first["map"].values())))
    assert (first["macs"], first["params"], first["latency_ms"]) == (400, 4, 30.0)
    assert first["interval"]["verdict"] in ("holds", "inferior", "undecided")
    assert set(first["seconds"]) == {"scores", "align", "evaluation"}
    measured = Ledger.existing(str(tmp_path)).round(1).read_measured()
    assert measured["stages"]["scores"]["hosts"] == ["here"]
    assert measured["stages"]["align"]["seconds_per_epoch"] == 1
    assert not measured["stages"]["scores"]["resumed"]


def test_a_scoring_stage_lasts_until_its_trials_have_ended(
    tmp_path: Path, make_world, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are held until then, and a plan counts it. A tie's sweep has trials of its own."""
    now = 0.0

    def trials_end() -> None:
        nonlocal now
        now += 3.0

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    make_world(perfect=True, trials_end=trials_end).run(str(tmp_path))
    stages = Ledger.existing(str(tmp_path)).round(1).read_measured()["stages"]
    assert (stages["scores"]["seconds"], stages["tie"]["seconds"]) == (3.0, 3.0)


def test_bundles_say_how_they_were_made(tmp_path: Path, make_world) -> None:
    summary = make_world().run(str(tmp_path))
    facts = json.loads((tmp_path / "rounds/02/model/config.json").read_text())["facts"]
    assert facts == {
        "experiment": "tiny",
        "round": 2,
        "dropped_block": 3,
        "learning_rate": 1e-4,
        "epoch": 2,
        "parent_result": summary.rounds[0].result,
    }


def test_running_again_does_nothing(tmp_path: Path, make_world) -> None:
    first = make_world().run(str(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    world = make_world()
    again = world.run(str(tmp_path))
    assert results(again) == results(first)
    assert (world.tasks, world.aligned, world.timed) == ([], [], 0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_results_do_not_depend_on_where_or_when(tmp_path: Path, make_world) -> None:
    """Slices, measured times and the file system differ; the results do not."""
    expected = results(make_world().run(str(tmp_path / "a")))
    slow = make_world({"execution__max_workers": 3, "execution__slices_per_worker": 3})
    slow.timed = 77
    assert results(slow.run(Storage(fs._MockFileSystem(), "bucket/run"))) == expected
    subtree = Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "b")
    assert results(make_world().run(subtree)) == expected


def test_on_s3_killed_and_started_again(tmp_path: Path, make_world, mortal, killed, s3_uri) -> None:
    """With a round committed and another begun; on a local disk the next test tries every write."""
    writes, expected = undisturbed(make_world, mortal, tmp_path / "local", RULES)
    run_dir, world = s3_uri("run"), make_world({"experiment__stopping": RULES})
    with pytest.raises(killed):
        world.run(mortal(run_dir, writes.index("rounds/02/decision.json")))
    assert results(world.run(run_dir)) == expected
    assert verify(run_dir) == []
    assert max(Counter(world.slices).values()) == 1
    assert not [name for name in Storage.at(run_dir)._all_names("", True) if TEMPORARY in name]


@pytest.mark.parametrize("change", [{"experiment__seed": 1}, {"experiment__name": "other"}])
def test_results_depend_on_the_experiment(tmp_path: Path, make_world, change: dict[str, Any]) -> None:
    assert set(results(make_world().run(str(tmp_path / "a")))).isdisjoint(
        results(make_world(change).run(str(tmp_path / "b")))
    )


def undisturbed(make_world, mortal, run_dir: Path, rules: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of all that a run writes, in order, and its results."""
    storage = mortal(str(run_dir))
    expected = results(make_world({"experiment__stopping": rules}).run(storage))
    return storage.writes, expected


RULES = {"max_drops": 2, "tolerance": 0.9}
"""With the selection sweeps too."""


def test_killed_in_any_write_and_started_again(tmp_path: Path, make_world, mortal, killed) -> None:
    """Of the teacher and a round; the next test is killed in a second round, too."""
    rules = RULES | {"max_drops": 1}
    writes, expected = undisturbed(make_world, mortal, tmp_path / "whole", rules)
    assert len(writes) > 30
    for lifetime in range(len(writes)):
        run_dir = str(tmp_path / f"{lifetime}")
        world = make_world({"experiment__stopping": rules})
        with pytest.raises(killed):
            world.run(mortal(run_dir, lifetime))
        summary = world.run(run_dir)
        assert results(summary) == expected, lifetime
        assert verify(run_dir) == []
        assert max(Counter(world.slices).values()) == 1, f"a slice on disk was scored again: {lifetime}"
        assert max(Counter(task.round for task in world.aligned).values()) <= 2
        assert not [path for path in Path(run_dir).rglob("*") if TEMPORARY in path.name]


@pytest.mark.parametrize("lifetime", [6, 7, 9])
def test_killed_again_and_again(tmp_path: Path, make_world, mortal, killed, lifetime: int) -> None:
    _, expected = undisturbed(make_world, mortal, tmp_path / "whole", RULES)
    run_dir, world = str(tmp_path / "run"), make_world({"experiment__stopping": RULES})
    for _ in range(100):
        try:
            summary = world.run(mortal(run_dir, lifetime))
            break
        except killed:
            continue
    assert results(summary) == expected
    assert max(Counter(world.slices).values()) == 1
    assert verify(run_dir) == []


def test_killed_in_a_step(tmp_path: Path, make_world, killed) -> None:
    expected = results(make_world().run(str(tmp_path / "whole")))
    for step in ("align", "latency", "sweep"):
        for call in range(1, 4):
            run_dir, world, calls = str(tmp_path / f"{step}{call}"), make_world(), Counter()
            original = getattr(world, step)

            def dying(*args: Any, step: str = step, call: int = call, calls=calls, original=original) -> Any:
                calls[step] += 1
                if calls[step] == call:
                    raise killed(step)
                return original(*args)

            setattr(world, step, dying)
            if step == "align" and call == 3:
                continue  # two rounds only
            with pytest.raises(killed):
                world.run(run_dir)
            assert results(world.run(run_dir)) == expected


def test_slices_in_any_order_and_twice(tmp_path: Path, make_world) -> None:
    expected = results(make_world().run(str(tmp_path / "a")))
    world = make_world()
    original = world.sweep

    def disorderly(task, feed):
        """Take all that can be taken, the first twice; give them back last first."""
        taken = [feed.take()]
        feed.put_back(taken[0])
        while (work := feed.take()) is not None:
            taken.append(work)
        part = getattr(world.split, task.subset)
        for work in reversed(taken):
            feed.give(work, world.rows(task, part.select(work.piece.videos)))
        return original(task, feed)

    world.sweep = disorderly
    assert results(world.run(str(tmp_path / "b"))) == expected


def test_a_sweep_that_ends_early_is_noticed(tmp_path: Path, make_world) -> None:
    world = make_world()
    original = world.sweep

    def leave_one(task, feed):
        feed.take()
        return original(task, feed)

    world.sweep = leave_one
    with pytest.raises(RuntimeError, match="sweep teacher-evaluation ended with 33% of its videos missing"):
        world.run(str(tmp_path))


def test_scratch_of_the_cluster_goes_with_the_commit(tmp_path: Path, make_world, killed) -> None:
    world = make_world()
    original, seen = world.align, []

    def align(task):
        assert not (tmp_path / "ray").exists()
        (tmp_path / "ray" / "run").mkdir(parents=True)
        seen.append(task.round)
        if len(seen) == 1:
            raise killed
        return original(task)

    world.align = align
    with pytest.raises(killed):
        world.run(str(tmp_path))
    assert (tmp_path / "ray").is_dir(), "what the open round needs to resume stays"
    world.align = original
    world.run(str(tmp_path))
    assert not (tmp_path / "ray").exists()


def test_stale_scratch_is_cleared_before_a_round(tmp_path: Path, make_world) -> None:
    make_world().run(str(tmp_path))
    (tmp_path / "rounds/02").rename(tmp_path / "gone")
    (tmp_path / "ray" / "run").mkdir(parents=True)
    world = make_world()
    original = world.sweep

    def sweep(task, feed):
        assert not (tmp_path / "ray").exists()
        return original(task, feed)

    world.sweep = sweep
    world.run(str(tmp_path))


def test_none_trains_nothing(tmp_path: Path, make_world) -> None:
    world = make_world({"experiment__alignment": {"trainable": "none"}})
    summary = world.run(str(tmp_path))
    assert world.aligned == []
    record = summary.rounds[1]
    assert (record.learning_rate, record.epoch) == (None, 0)
    assert record.curves is not None
    assert record.curves.num_rows == 0
    assert read_summary(tmp_path)["rounds"][0]["lr"] is None
    assert verify(str(tmp_path)) == []
    again = make_world({"experiment__alignment": {"trainable": "none"}})
    assert results(again.run(str(tmp_path))) == results(summary)


@pytest.mark.parametrize(
    ("rules", "drops", "reason"),
    [
        ({"max_drops": 0}, 0, "at most 0 blocks"),
        ({}, 1, "at most 1 blocks"),
        ({"max_drops": 3}, 3, "at most 3 blocks"),
        ({"max_drops": 3, "target_macs_ratio": 0.65}, 2, "MACs are 0.6000"),
        ({"max_drops": 3, "target_latency_ratio": 0.8}, 1, "latency is 0.7500"),
        ({"max_drops": 3, "tolerance": 1.5}, 3, "at most 3 blocks"),
    ],
)
def test_stopping(tmp_path: Path, make_world, rules: dict[str, Any], drops: int, reason: str) -> None:
    world = make_world({"experiment__stopping": rules})
    summary = world.run(str(tmp_path))
    assert len(summary.rounds) == drops
    assert reason in (summary.stop_reason or "")
    selection = [task.name for task in world.tasks if task.subset == "selection"]
    assert len(selection) == (drops + 1 if "tolerance" in rules else 0)


def test_latency_is_measured_once(tmp_path: Path, make_world, killed) -> None:
    """The stopping rule reads the first measurement after a resume, whatever a second would say."""
    rules = {"experiment__stopping": {"max_drops": 3, "target_latency_ratio": 0.8}}
    world = make_world(rules)
    assert len(world.run(str(tmp_path)).rounds) == 1
    other = make_world(rules, latency_ms=lambda model: 1000.0)
    assert len(other.run(str(tmp_path)).rounds) == 1
    assert other.timed == 0


@pytest.mark.parametrize("criterion", ["train_loss", "mse"])
def test_other_criteria(tmp_path: Path, make_world, criterion: str) -> None:
    world = make_world({"experiment__scoring": {"criterion": criterion}})
    summary = world.run(str(tmp_path))
    assert [record.decision.dropped_block for record in summary.rounds] == [1, 3]
    assert {task.criterion for task in world.tasks if task.subset == "fit"} == {criterion}
    assert {task.criterion for task in world.tasks if task.subset != "fit"} == {"map"}


def test_alignment_terms_bring_the_teacher(tmp_path: Path, make_world) -> None:
    world = make_world({"experiment__scoring": {"criterion": "train_loss", "loss_terms": "total"}})
    world.run(str(tmp_path))
    assert all((task.teacher is not None) == (task.subset == "fit") for task in world.tasks)


def test_saturated_ties_are_told_apart_by_the_training_loss(tmp_path: Path, make_world) -> None:
    world = make_world(perfect=True)
    summary = world.run(str(tmp_path))
    decision = summary.rounds[0].decision
    assert [task.name for task in world.tasks][1:3] == ["round-01-scores", "round-01-tie"]
    assert [task.criterion for task in world.tasks][1:3] == ["map", "train_loss"]
    losses = {score.block: score.train_loss for score in decision.scores}
    assert losses[-1] is None
    assert sorted(block for block, loss in losses.items() if loss is not None) == [0, 1, 2, 3]
    assert decision.dropped_block == min((b for b in losses if b >= 0), key=lambda b: losses[b])
    assert decision.tie
    again = Ledger.existing(str(tmp_path)).round(1).read_decision()
    assert again == decision
    assert verify(str(tmp_path)) == []


def test_unsaturated_ties_go_to_the_lower_index(tmp_path: Path, make_world) -> None:
    world = make_world({"experiment__scoring": {"saturation": 1.0}}, perfect=True)
    summary = world.run(str(tmp_path))
    assert [record.decision.dropped_block for record in summary.rounds] == [0, 1]
    assert not [task for task in world.tasks if task.criterion == "train_loss"]


def test_scoring_on_a_share_of_the_videos(tmp_path: Path, make_world) -> None:
    world = make_world({"experiment__scoring": {"video_fraction": 0.5}})
    summary = world.run(str(tmp_path))
    assert {score.videos for record in summary.rounds for score in record.decision.scores} == {4}


def test_another_teacher_is_refused(tmp_path: Path, make_world, first_model) -> None:
    make_world().run(str(tmp_path))
    weights = dict(first_model().weights) | {"head.w": np.zeros(3, np.float32)}
    with pytest.raises(LedgerError, match="holds another teacher than the one given"):
        make_world().run(str(tmp_path), Model((0, 1, 2, 3), weights))


def test_other_annotations_are_refused(tmp_path: Path, make_world, make_videos) -> None:
    world = make_world()
    world.run(str(tmp_path))
    world.split = replace(world.split, fit=make_videos("fit", 7, 99))
    with pytest.raises(LedgerError, match="the annotations are not those the run began with"):
        world.run(str(tmp_path))


def test_other_conditions_are_marked(tmp_path: Path, make_world, mortal, killed) -> None:
    expected = results(make_world().run(str(tmp_path / "whole")))
    world = make_world()
    with pytest.raises(killed):
        world.run(mortal(str(tmp_path / "run"), 20))
    other = make_world({"execution__threads_per_worker": 2, "execution__max_workers": 1})
    summary = other.run(str(tmp_path / "run"))
    assert results(summary) == expected
    assert not summary.bit_exact
    assert not read_summary(tmp_path / "run")["bit_exact"]
    assert "not bit-exact with the first start: threads_per_worker: 1 -> 2" in other.lines


def test_other_conditions_of_a_start_that_computes_nothing(tmp_path: Path, make_world) -> None:
    make_world().run(str(tmp_path / "run"))
    other = make_world({"execution__threads_per_worker": 2})
    assert other.run(str(tmp_path / "run")).bit_exact
    assert not [line for line in other.lines if "bit-exact" in line]


@pytest.mark.parametrize("subset", ["fit", "selection", "test"])
def test_empty_subsets_are_named(tmp_path: Path, make_world, subset: str) -> None:
    world = make_world({"experiment__stopping": {"max_drops": 1, "tolerance": 0.1}})
    world.split = replace(world.split, **{subset: world.split.fit.select([])})
    with pytest.raises(ValueError, match=f"the {subset} subset has no videos"):
        world.run(str(tmp_path))


def test_progress_is_told(tmp_path: Path, make_world) -> None:
    world = make_world({"experiment__stopping": {"max_drops": 1}})
    summary = world.run(str(tmp_path))
    short = [line.split(", mAP")[0] for line in world.lines]
    assert short == [
        "teacher: evaluation, 6 videos",
        "teacher: committed",
        "round 1: scores, 7 videos",
        "round 1: drop block 1",
        "round 1: align, 3 blocks",
        "round 1: evaluation, 6 videos",
        "round 1: committed",
        "stop: dropped 1 of at most 1 blocks",
    ]
    assert world.lines[1].endswith(f"result {summary.teacher.result[:12]}")


def test_those_who_watch_are_told_the_scores(tmp_path: Path, make_world) -> None:
    world = make_world(perfect=True)
    summary = world.run(str(tmp_path))
    assert [name for name, _, final in world.told if final] == [
        "round-01-scores",
        "round-01-tie",
        "round-02-scores",
        "round-02-tie",
    ]
    assert [score.block for score in world.told[0][1]] == [-1, 0, 1, 2, 3]
    assert [score.score for score in world.told[2][1]] == [
        score.score for score in summary.rounds[1].decision.scores
    ]
