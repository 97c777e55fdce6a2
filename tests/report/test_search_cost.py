"""What the search cost, and what was to be expected, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pbd_ray.report.evidence import Evidence
from pbd_ray.report.search_cost import StageCost, search_cost_info


@pytest.fixture
def stages(evidence: Evidence) -> dict[tuple[int, str], StageCost]:
    return {(stage.round, stage.stage): stage for stage in search_cost_info(evidence)}


def test_held_resources(stages: dict[tuple[int, str], StageCost]) -> None:
    """Half a CPU each: two workers for 20 s; two runs of 30 s."""
    assert stages[1, "scores"].cpu_hours == pytest.approx(20 * 2 * 0.5 / 3600)
    assert stages[1, "align"].cpu_hours == pytest.approx((30 + 30) * 0.5 / 3600)
    assert {stage.gpu_hours for stage in stages.values()} == {0.0}


def test_a_round_with_other_workers(evidence: Evidence) -> None:
    """A later start of the run had workers of another size: each round counts those that it had."""
    scores = {**measured_of(evidence)["scores"], "cpus_per_worker": 4.0, "gpus_per_worker": 1.0}
    rounds = [replace(evidence.rounds[0], measured={"stages": {"scores": scores}}), *evidence.rounds[1:]]
    found = {(s.round, s.stage): s for s in search_cost_info(replace(evidence, rounds=rounds))}
    assert found[1, "scores"].cpu_hours == pytest.approx(20 * 2 * 4 / 3600)
    assert found[1, "scores"].gpu_hours == pytest.approx(20 * 2 / 3600)
    assert found[3, "scores"].cpu_hours == pytest.approx(18 * 2 * 0.5 / 3600)


def test_an_alignment_that_went_on(evidence: Evidence) -> None:
    """Some of it was done before, and nothing is measured by it."""
    stages = {**measured_of(evidence), "align": {**measured_of(evidence)["align"], "resumed": True}}
    rounds = [replace(evidence.rounds[0], measured={"stages": stages}), *evidence.rounds[1:]]
    found = {(s.round, s.stage): s for s in search_cost_info(replace(evidence, rounds=rounds))}
    assert found[1, "align"].resumed
    assert found[2, "align"].expected_seconds is None
    assert not found[2, "align"].resumed


def measured_of(evidence: Evidence) -> dict[str, Any]:
    return dict(evidence.rounds[0].measured["stages"])


def test_expected_scoring(stages: dict[tuple[int, str], StageCost]) -> None:
    """A block is 0.5 G MACs, the rest of the detector 1 G; block 0 was stopped after 5 of 10 videos.

    Round 1, blocks 0 1 2 3: 10 x 3 G, and from the forks 5 x (3 b + r), 10 x (2 b + r), 10 x (b + r), 10 x r.
    Round 3 starts from round 1, as round 2 was rolled back, with blocks 0 1 3.
    """
    b, r = 0.5, 1.0
    first = 10 * (4 * b + r) + 5 * (3 * b + r) + 10 * (2 * b + r) + 10 * (b + r) + 10 * r
    third = 10 * (3 * b + r) + 5 * (2 * b + r) + 10 * (b + r) + 10 * r
    assert stages[1, "scores"].expected_seconds is None
    assert stages[3, "scores"].expected_seconds == pytest.approx(20 * third / first)


def test_expected_alignment(stages: dict[tuple[int, str], StageCost]) -> None:
    """Three forwards' worth of the student and one of the teacher, 6 epochs in both rounds."""
    teacher, first, third = 3.0, 2.5, 2.0
    ratio = (3 * third + teacher) / (3 * first + teacher)
    assert stages[3, "align"].expected_seconds == pytest.approx(40 * ratio)
    assert stages[3, "evaluation"].expected_seconds == pytest.approx(3 * third / first)
