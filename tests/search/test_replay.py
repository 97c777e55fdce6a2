"""Another metric on stored detections: against the evaluator on tables filtered by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pbd_ray.config import ConfigError
from pbd_ray.metrics.mean_ap import mean_average_precision
from pbd_ray.report.whatif import ReplayedRound, whatif_text
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.replay import replay

TIOUS = (0.3, 0.5, 0.7)


@pytest.fixture
def world(make_world: Callable[..., Any]) -> Any:
    return make_world({"experiment__scoring__racing": None})


@pytest.fixture
def ledger(world: Any, tmp_path: Path) -> Ledger:
    world.run(str(tmp_path))
    return Ledger.existing(str(tmp_path))


def test_the_runs_own_metric_chooses_the_same(ledger: Ledger) -> None:
    found = replay(ledger, (0.5,))
    assert [one.round for one in found] == [1, 2]
    for one, record in zip(found, ledger.committed()[1:], strict=True):
        assert record.decision is not None
        assert one.dropped_block == record.decision.dropped_block
        (metric,) = one.metrics
        assert (metric.metric, metric.block, metric.lead) == ("mAP@0.5", one.dropped_block, None)
        assert metric.tau == pytest.approx(1.0)


def best(world: Any, rows: pa.Table, blocks: tuple[int, ...], tiou: float, label: int | None) -> int:
    """The block that the evaluator prefers, counting instances and detections of one class or of all."""
    truth = world.split.fit.ground_truth()
    names = [video.id for video in world.split.fit.videos]
    if label is not None:
        truth, rows = (table.filter(pc.equal(table["label"], label)) for table in (truth, rows))
    scores = {}
    for block in blocks:
        mine = rows.filter(pc.equal(rows["candidate"], block))
        quality = mean_average_precision(truth, mine, TIOUS, 2, names)
        scores[block] = (quality.map[tiou], quality.average_map)
    return max(scores, key=lambda block: (*scores[block], -block))


@pytest.mark.parametrize(("classes", "label"), [(None, None), (["jump"], 0), (["run"], 1)])
def test_against_the_evaluator(
    ledger: Ledger, world: Any, classes: list[str] | None, label: int | None
) -> None:
    for one in replay(ledger, TIOUS, classes):
        rows = ledger.round(one.round).read_slices("scores")
        blocks = tuple(sorted(set(rows["candidate"].to_pylist()) - {-1}))
        assert [metric.metric for metric in one.metrics] == [
            *(f"mAP@{tiou:g}" for tiou in TIOUS),
            "average mAP",
        ]
        for tiou, metric in zip(TIOUS, one.metrics, strict=False):
            assert metric.block == best(world, rows, blocks, tiou, label)


def spoiled(table: pa.Table) -> pa.Table:
    """Without block 1 nobody jumps, without 2 some do not run, without 0 nobody runs; 3 sees nothing."""
    if "label" not in table.column_names:
        return table
    unseen = {(0, 1): 2.0, (1, 0): 2.0, (2, 1): 0.5, (3, 0): 2.0, (3, 1): 2.0}
    kept = [row["score"] >= unseen.get((row["candidate"], row["label"]), 0.0) for row in table.to_pylist()]
    return table.filter(pa.array(kept))


def test_another_block(make_world: Callable[..., Any], tmp_path: Path) -> None:
    """All in all block 2 goes; whoever looks at runs alone would have taken block 1."""
    world = make_world({"experiment__scoring__racing": None}, perfect=True)
    honest = world.rows
    world.rows = lambda task, part: spoiled(honest(task, part))
    world.run(str(tmp_path))
    first = replay(Ledger.existing(str(tmp_path)), (0.5,), ["run"])[0]
    assert (first.dropped_block, first.metrics[0].block) == (2, 1)
    lead = first.metrics[0].lead
    assert lead is not None
    assert 0 <= lead.low <= lead.value <= lead.high
    told = whatif_text((first,))
    assert "round 1: another block would have gone: 1" in told
    assert f"{lead.value:+.4f}" in told


def test_stopped_candidates_cannot_be_chosen(make_world: Callable[..., Any], tmp_path: Path) -> None:
    world = make_world(
        {"experiment__scoring__racing": {"min_videos": 5, "min_instances": 1, "error_rate": 0.4}},
    )
    world.run(str(tmp_path))
    ledger = Ledger.existing(str(tmp_path))
    decision = ledger.committed()[1].decision
    assert decision is not None
    stopped = tuple(score.block for score in decision.scores if score.stopped)
    assert stopped, "the race must stop someone for this test to say anything"
    first = replay(ledger, (0.5,))[0]
    assert first.stopped == stopped
    assert first.candidates == 4
    assert first.metrics[0].block not in stopped
    assert f"racing had stopped blocks {', '.join(map(str, stopped))}" in whatif_text((first,))


@pytest.mark.parametrize(
    ("classes", "problem"),
    [(["swim"], "'swim' is none of the run's 2 classes"), (["jump", "swim"], "'swim'")],
)
def test_unknown_classes(ledger: Ledger, classes: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        replay(ledger, (0.5,), classes)


def test_rounds_without_detections(make_world: Callable[..., Any], tmp_path: Path) -> None:
    world = make_world({"experiment__scoring__criterion": "mse"})
    world.run(str(tmp_path))
    found: tuple[ReplayedRound, ...] = replay(Ledger.existing(str(tmp_path)), (0.5,))
    assert found == ()
    assert "no committed round was scored by mAP" in whatif_text(found)
