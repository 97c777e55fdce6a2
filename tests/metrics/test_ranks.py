"""Kendall's tau-b against counting pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pbd_ray.metrics.ranks import kendall_tau


def counted(first: list[float], second: list[float]) -> float:
    agree = disagree = tied_first = tied_second = 0
    for (a, b), (c, d) in itertools.combinations(zip(first, second, strict=True), 2):
        tied_first += a == c
        tied_second += b == d
        agree += (a - c) * (b - d) > 0
        disagree += (a - c) * (b - d) < 0
    pairs = math.comb(len(first), 2)
    return (agree - disagree) / math.sqrt((pairs - tied_first) * (pairs - tied_second))


@pytest.mark.parametrize("seed", range(5))
def test_against_counting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 6, size=(2, 9)).astype(float).tolist()
    assert kendall_tau(first, second) == pytest.approx(counted(first, second), abs=1e-12)


@pytest.mark.parametrize(
    ("second", "expected"),
    [([1.0, 2.0, 3.0], 1.0), ([3.0, 2.0, 1.0], -1.0), ([1.0, 3.0, 2.0], 1 / 3), ([1.0, 1.0, 1.0], math.nan)],
)
def test_known(second: list[float], expected: float) -> None:
    assert kendall_tau([1.0, 2.0, 3.0], second) == pytest.approx(expected, nan_ok=True)
