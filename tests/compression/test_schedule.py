"""Learning rate and EMA decay at chosen steps; whole schedules of the release are in the golden tier."""

from __future__ import annotations

import math

import pytest

from pbd_ray.compression.schedule import FLOOR, ema_decay, learning_rate
from pbd_ray.config import OptimizerConfig

OPTIONS = OptimizerConfig(epochs=6, schedule_epochs=8, warmup_epochs=2)


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.0), (1, 1 / 9), (9, 1.0), (10, 1.0), (25, 0.5), (40, 0.0), (1000, 0.0)],
)
def test_warm_up_then_cosine(step: int, share: float) -> None:
    """5 steps an epoch: 10 of warm-up, 30 of cosine."""
    expected = FLOOR + (2e-4 - FLOOR) * share if step >= 10 else 2e-4 * share
    assert learning_rate(step, 2e-4, OPTIONS, 5) == pytest.approx(expected, rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("warmup", [0, 0.1, 0.2, 0.3, 8])
def test_odd_warm_ups(warmup: float) -> None:
    """Less than one step, one step, all of the schedule: finite, at most the peak, and not falling in it."""
    options = OPTIONS.model_copy(update={"warmup_epochs": warmup})
    rates = [learning_rate(step, 1.0, options, 5) for step in range(45)]
    assert all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize(
    ("warms_up", "step", "expected"),
    [
        (False, 0, 0.999), (False, 5, 0.999),
        (True, 0, 1 / 10), (True, 1, 2 / 11), (True, 90, 91 / 100), (True, 8990, 8991 / 9000),
        (True, 8989, 8990 / 8999), (True, 9000, 0.999),
    ],
)  # fmt: skip
def test_ema_decay(warms_up: bool, step: int, expected: float) -> None:
    options = OPTIONS.model_copy(update={"ema_warmup": warms_up})
    assert ema_decay(step, options) == pytest.approx(expected, rel=1e-12)
