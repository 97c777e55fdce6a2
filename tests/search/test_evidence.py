"""What a report is made from, gathered from a run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.metrics.mean_ap import mean_average_precision
from pbd_ray.search.evidence import gather
from pbd_ray.search.ledger import Ledger, LedgerError


def test_detections_are_those_that_were_evaluated(make_world: Callable[..., Any], tmp_path: Path) -> None:
    world = make_world()
    summary = world.run(str(tmp_path))
    found = gather(Ledger.existing(str(tmp_path)))
    assert found.counts == {"fit": 7, "selection": 3, "test": 6}
    assert len(found.rounds) == len(summary.rounds) == len(found.summary["rounds"])
    names = [video.id for video in world.split.test.videos]
    for record, depth in zip((summary.teacher, *summary.rounds), (found.teacher, *found.rounds), strict=True):
        quality = mean_average_precision(found.test.ground_truth(), depth.detections, (0.3, 0.5), 2, names)
        assert quality.map[0.5] == record.evaluation.map[0.5]
        assert depth.measured["latency"] == record.measured["latency"]
    assert found.teacher.curves is None
    assert all(depth.curves is not None for depth in found.rounds)


def test_published_as_it_stands(make_world: Callable[..., Any], tmp_path: Path) -> None:
    """The report is asked for after every commit, with a summary of all that is committed."""
    world, seen = make_world(), []
    world.publish = lambda: seen.append(len(gather(Ledger.existing(str(tmp_path))).rounds))
    world.run(str(tmp_path))
    assert seen == [0, 1, 2]


def test_nothing_committed(make_world: Callable[..., Any], tmp_path: Path) -> None:
    Ledger.open(str(tmp_path), make_world().recipe)
    with pytest.raises(LedgerError, match="not even the teacher is committed yet"):
        gather(Ledger.existing(str(tmp_path)))
