"""What the log and the metrics say of a sweep and of a grid of learning rates; no Ray."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pbd_ray.cluster import alignment_status, metrics_export, sweep_status
from pbd_ray.cluster.alignment_status import AlignmentStatus
from pbd_ray.cluster.pool import Pace
from pbd_ray.cluster.sweep_status import SweepStatus
from pbd_ray.compression.finetune import LossTerms
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.state import UNDROPPED, CandidateScore, Model, Slice, SweepTask, Work

Values = dict[tuple[str, ...], float]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Values:
    """(metric, label values) -> what it is at the end; counters are summed."""
    values: Values = {}

    class Exporter:
        def hold(self, metric: Any, value: float, labels: dict[str, str]) -> None:
            assert set(labels) == set(metric.labels)
            values[metric.name, *labels.values()] = value

        def add(self, metric: Any, amount: float, labels: dict[str, str]) -> None:
            assert set(labels) == set(metric.labels)
            key = (metric.name, *labels.values())
            values[key] = values.get(key, 0.0) + amount

        def forget(self, metric: Any) -> None:
            for key in [key for key in values if key[0] == metric.name]:
                del values[key]

    monkeypatch.setattr(metrics_export, "_exporter", Exporter())
    return values


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Status lines without what depends on the clock."""
    lines: list[str] = []

    class Status:
        def __init__(self, stage: str, seconds: float, say: Callable[[str], None]) -> None:
            self._stage = stage

        def __call__(self, done: float, *facts: str, begun: float = 0.0) -> None:
            lines.append(f"{self._stage}: {done:.0%} from {begun:.0%}, {', '.join(filter(None, facts))}")

    monkeypatch.setattr(sweep_status, "Status", Status)
    monkeypatch.setattr(alignment_status, "Status", Status)
    return lines


def score(block: int, value: float, stopped: bool = False) -> CandidateScore:
    return CandidateScore(block, value, None, None, 4, stopped)


@pytest.mark.parametrize(
    ("criterion", "best"), [("map", (3, 0.75)), ("train_loss", (2, 0.5)), ("mse", (2, 0.5))]
)
def test_scores(criterion: Any, best: tuple[int, float], told: Values, said: list[str]) -> None:
    """One of four slices was on record; block 1 is out of the race, however good it looked."""
    plan = tuple(Slice(index, (f"v{index}",), index // 2) for index in range(4))
    task = SweepTask("round-02-scores", 2, Model((1, 2, 3), {}), (1, 2, 3), criterion, "fit")
    feed = SliceFeed(plan, (1, 2, 3), (0,), lambda work, table: None, lambda stage, alive: (2, 3))
    told["pbd_ray_best_candidate_score", "of the round before"] = 0.9
    status = SweepStatus(task, feed, 10.0, said.append)
    status.tell(Pace(2, 0.0))
    feed.give(Work(plan[1], (1, 2, 3)), None)
    status.scored([score(1, 0.9 if criterion == "map" else 0.1, True), score(2, 0.5), score(3, 0.75)])
    status.scored([score(2, 0.5), score(3, 0.75), score(UNDROPPED, 0.8)])
    status.tell(Pace(2, 12.345))
    block, value = best
    assert said == [
        "round 2: scores: 25% from 25%, 3 of 3 candidates, 2 workers",
        f"round 2: scores: 50% from 25%, 2 of 3 candidates, block {block} leads with {value:.4f}, 2 workers,"
        " 12.3 windows/s",
    ]
    assert told == {
        ("pbd_ray_round",): 2,
        ("pbd_ray_slices",): 4,
        ("pbd_ray_slices_done",): 2,
        ("pbd_ray_windows_per_second", "scores"): 12.345,
        ("pbd_ray_candidates_alive",): 2,
        ("pbd_ray_best_candidate_score", criterion): value,
        ("pbd_ray_undropped_score", criterion): 0.8,
    }


LOSSES = dict.fromkeys(LossTerms.__dataclass_fields__, 0.25)


def epoch(number: int, quality: float | None) -> dict[str, Any]:
    measured = {"seconds": 3.0, "windows_per_second": 8.0, "decode_wait_seconds": 0.5}
    return {"epoch": number, **LOSSES, "selection_map": quality, **measured}


class Trial(SimpleNamespace):
    def __str__(self) -> str:
        return f"round-01-lr-{self.config['grid'][1]!r}"


def test_alignment(told: Values, said: list[str]) -> None:
    """Two learning rates of four epochs; one goes on after its second, which an earlier driver trained."""
    events: list[str] = []
    status = AlignmentStatus(1, 2, 4, 10.0, events.append)
    low, high = (Trial(config={"grid": (index, rate)}) for index, rate in enumerate((1e-4, 1e-3)))
    status.on_step_end(1, [])
    status.on_trial_result(1, [], low, epoch(2, None))
    status.on_trial_recover(1, [], low)
    status.on_trial_result(1, [], low, epoch(3, 0.6))
    status.on_trial_result(1, [], low, {"last_checkpoint": "somewhere"})  # its last word is no epoch
    status.on_trial_result(1, [], high, epoch(0, 0.5))
    status.on_step_end(2, [])
    status.on_trial_result(1, [], high, epoch(1, math.nan))
    assert said == [
        "round 1: align: 0% from 0%, 2 learning rates, epoch 0 of 8",
        "round 1: align: 62% from 25%, 2 learning rates, epoch 5 of 8, best selection mAP 0.6000 at 0.0001",
    ]
    assert events == [
        "round-01-lr-0.0001: epoch 3/4, loss 0.2500 (3 s, 8 windows/s)",
        "round-01-lr-0.0001: epoch 4/4, loss 0.2500, selection mAP 0.6000 (3 s, 8 windows/s)",
        "round-01-lr-0.001: epoch 1/4, loss 0.2500, selection mAP 0.5000 (3 s, 8 windows/s)",
        "round-01-lr-0.001: epoch 2/4, loss 0.2500 (3 s, 8 windows/s)",
    ]
    status.on_trial_complete(2, [], low)
    status.on_trial_complete(2, [], high)  # it diverged: of its last two epochs nothing is left
    status.on_step_end(3, [])
    assert said[-1].startswith("round 1: align: 100% from 50%, 2 learning rates, epoch 8 of 8")
    assert told["pbd_ray_epochs_done", "0.0001"] == 4
    assert told["pbd_ray_selection_map", "0.0001"] == 0.6
    assert told["pbd_ray_loss", "0.001", "focal"] == 0.25
    assert told["pbd_ray_windows_per_second", "learning rate 0.001"] == 8
    assert told["pbd_ray_decode_wait_seconds", "align"] == 2.0
    assert told["pbd_ray_retries",] == 1
    AlignmentStatus(2, 1, 4, 10.0, events.append)
    assert not [key for key in told if key[0] in ("pbd_ray_loss", "pbd_ray_epochs_done")], "of round 1"
