"""What Ray is told, when, and that the list in the docs is the list."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.util import metrics

from pbd_ray.cluster import metrics_export as exported

DOCS = Path(__file__).parents[2] / "docs" / "watching.md"


class Told:
    """Stands for Ray's metrics: what each was told, in order."""

    def __init__(self) -> None:
        self.records: list[tuple[str, float, dict[str, str]]] = []
        self.again = threading.Event()

    def kind(self, name: str, meaning: str, labels: tuple[str, ...]) -> Any:
        return SimpleNamespace(_record=lambda value, tags: self.record(name, labels, value, tags))

    def record(self, name: str, labels: tuple[str, ...], value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(labels), "Ray refuses a metric with other labels than it was made with"
        self.records.append((name, value, tags))
        if [entry[0] for entry in self.records].count("pbd_ray_round") > 2:
            self.again.set()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    there = Told()
    monkeypatch.setattr(metrics, "Gauge", there.kind)
    monkeypatch.setattr(metrics, "Counter", there.kind)
    yield there
    before = len(there.records)
    exported.ROUND.set(9)
    exported.RETRIES.add(1)
    assert len(there.records) == before, "outside the context nothing is said"


def test_every_metric_is_of_the_run(told: Told) -> None:
    with exported.exporting("runs/1"):
        exported.LOSS.set(0.5, learning_rate="0.0001", term="focal")
        exported.DECODE_WAIT.add(0.0, stage="scores")
    assert told.records == [
        ("pbd_ray_retries", 0.0, {"run": "runs/1"}),  # there before anything was retried
        ("pbd_ray_loss", 0.5, {"run": "runs/1", "learning_rate": "0.0001", "term": "focal"}),
        ("pbd_ray_decode_wait_seconds", 0.0, {"run": "runs/1", "stage": "scores"}),
    ]


def test_gauges_are_told_again_until_they_are_cleared(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "REFRESH_SECONDS", 0.001)
    with exported.exporting("runs/1"):
        exported.SLICES.set(3)
        exported.SLICES.clear()
        exported.ROUND.set(1)
        exported.ROUND.set(2)
        assert told.again.wait(10)
    values = [value for name, value, _ in told.records if name == "pbd_ray_round"]
    assert values[:3] == [1, 2, 2]
    assert [name for name, *_ in told.records].count("pbd_ray_slices") == 1


def test_the_docs_list_every_metric() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `ray_pbd_")]
    listed = [tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in rows]
    assert listed == [
        (
            f"`ray_{metric.name}{'_total' if isinstance(metric, exported.Counter) else ''}`",
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.meaning,
        )
        for metric in exported.METRICS
    ]
