"""Which depth a budget picks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pbd_ray.config import ConfigError
from pbd_ray.report.evidence import Evidence
from pbd_ray.report.pick import limits_of, pick
from pbd_ray.report.rounds import DepthInfo, depths_info, frontier


@pytest.fixture
def depths(evidence: Evidence) -> tuple[DepthInfo, ...]:
    """4, 3 and 2 blocks: MACs 1, 0.83, 0.67; latency 1, 0.8, 0.6; mAP 0.60, 0.61, 0.59."""
    return frontier(depths_info(evidence.summary))


@pytest.mark.parametrize(
    ("texts", "blocks"),
    [
        (["latency=1"], 4),
        (["latency=0.8"], 3),
        (["latency=0.79"], 2),
        (["macs=0.7"], 2),
        (["params=0.8"], 3),
        (["map_loss=0.02"], 2),
        (["map_loss=0.005"], 3),
        (["map_loss=0.02", "macs=0.9"], 2),
        (["macs=0.9", "latency=0.9"], 3),
    ],
)
def test_pick(depths: tuple[DepthInfo, ...], texts: list[str], blocks: int) -> None:
    """Budgets are met with as few drops as possible, a loss is spent on as many as possible."""
    assert pick(depths, limits_of(texts)).depth.blocks == blocks


def test_rolled_back_rounds_are_no_depths(evidence: Evidence) -> None:
    """Round 2 of the run has two blocks too, and is not among them."""
    labels = [depth.label for depth in frontier(depths_info(evidence.summary))]
    assert labels == ["teacher", "1", "3"]


def test_none_fits(depths: tuple[DepthInfo, ...]) -> None:
    with pytest.raises(ConfigError, match=r"no depth has latency at most 0\.5: 3 blocks have .* 0\.8000"):
        pick(depths, limits_of(["latency=0.5"]))
    worse = [replace(depth, headline_map=0.1) for depth in depths[1:]]
    with pytest.raises(ConfigError, match=r"no depth has map_loss at most 0\.1, macs at most 0\.9"):
        pick([depths[0], *worse], limits_of(["map_loss=0.1", "macs=0.9"]))


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["speed=2"], "'speed' is not one of latency, macs, params, map_loss"),
        (["macs"], "'' is not a number"),
        (["macs=much"], "'much' is not a number"),
        (["macs=1.5"], "1.5 is not a share"),
        (["macs=nan"], "nan is not a share"),
        (["map_loss=-1"], "-1 is not at least 0"),
        (["macs=0.8", "macs=0.9"], "'macs' is given twice"),
    ],
)
def test_limits_that_are_none(texts: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        limits_of(texts)
