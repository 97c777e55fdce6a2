"""Bootstrap over videos: what statistics of video weights come to when other videos like these are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from pbd_ray.metrics.mean_ap import MetricError

Floats = npt.NDArray[np.float64]
Method = Literal["percentile", "bca"]
Statistics = Callable[[Floats], Floats]
"""(R, V) video weights -> (R, K) values, each row of its own weights alone; nan where one is undefined."""

CHUNK = 128
"""Replicates computed at a time."""
_EVALUATION = 0xB007
"""Keeps these draws apart from others made with the recipe's seed."""


def evaluation_draws(seed: int) -> np.random.Generator:
    """The generator from which every interval of a run's evaluations is drawn: those over the same videos are
    over the same replicates, so rounds, classes and thresholds compare."""
    return np.random.default_rng(np.random.SeedSequence((seed, _EVALUATION)))


@dataclass(frozen=True, eq=False)
class Replicates:
    """K statistics, all of the same draws of videos; nan where one is undefined."""

    value: Floats
    """Of the videos as they are; (K,)."""
    drawn: Floats
    """(R, K)."""
    left_out: Floats | None
    """Without each video in turn (the jackknife), which BCa needs; (V, K)."""
    confidence: float

    def interval(self, column: int) -> tuple[float, float]:
        """Bounds of one statistic, from the replicates in which it is defined.

        Where it is in none, [-1, 1]: all that is known of a difference of two shares.
        """
        drawn = _defined(self.drawn[:, column])
        if not len(drawn):
            return -1.0, 1.0
        tail = (1 - self.confidence) / 2
        levels = np.array([tail, 1 - tail])
        if self.left_out is not None:
            left_out = _defined(self.left_out[:, column])
            levels = _bca_levels(levels, float(self.value[column]), drawn, left_out)
        low, high = np.quantile(drawn, levels)
        return float(low), float(high)


def bootstrap(
    statistics: Statistics,
    videos: int,
    rng: np.random.Generator,
    replicates: int,
    confidence: float,
    method: Method = "bca",
) -> Replicates:
    """Draw `videos` videos with replacement, again and again.

    Args:
        rng: seeded generator; the same state draws the same videos.
        method: percentile, or bca (bias-corrected and accelerated; Efron 1987), which also jackknifes.

    Raises:
        MetricError: no replicates, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1 or replicates < 1:
        raise MetricError(f"confidence {confidence} is not in (0, 1), or replicates {replicates} below 1")
    drawn = [statistics(weights) for weights in _resamples(videos, replicates, rng)]
    left_out = [statistics(weights) for weights in _leave_one_out(videos)] if method == "bca" else None
    return Replicates(
        value=statistics(np.ones((1, videos)))[0],
        drawn=np.concatenate(drawn),
        left_out=None if left_out is None else np.concatenate(left_out),
        confidence=confidence,
    )


def _defined(values: Floats) -> Floats:
    return values[~np.isnan(values)]


def _resamples(videos: int, replicates: int, rng: np.random.Generator) -> Iterator[Floats]:
    """How often each video is drawn, with replacement: chunks of (R, V)."""
    for begin in range(0, replicates, CHUNK):
        rows = min(CHUNK, replicates - begin)
        draws = rng.integers(videos, size=(rows, videos)) + videos * np.arange(rows)[:, None]
        counts = np.bincount(draws.ravel(), minlength=rows * videos)
        yield counts.reshape(rows, videos).astype(np.float64)


def _leave_one_out(videos: int) -> Iterator[Floats]:
    for begin in range(0, videos, CHUNK):
        out = np.arange(begin, min(begin + CHUNK, videos))
        weights = np.ones((len(out), videos))
        weights[np.arange(len(out)), out] = 0
        yield weights


def _bca_levels(levels: Floats, value: float, drawn: Floats, left_out: Floats) -> Floats:
    """Quantile levels corrected for median bias and for acceleration (Efron 1987, section 4)."""
    normal = NormalDist()
    below = (np.count_nonzero(drawn < value) + 0.5 * np.count_nonzero(drawn == value)) / len(drawn)
    edge = 0.5 / len(drawn)  # a share of 0 or 1 would be an infinite correction
    bias = normal.inv_cdf(min(max(float(below), edge), 1 - edge))
    deviation = left_out.mean() - left_out if len(left_out) else np.zeros(1)
    spread = float((deviation**2).sum())
    acceleration = float((deviation**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    corrected = []
    for level in levels:
        shifted = bias + normal.inv_cdf(float(level))
        scale = 1 - acceleration * shifted
        # The transformation ends where the scale does: past it the level is at its limit.
        corrected.append(normal.cdf(bias + shifted / scale) if scale > 0 else float(shifted > 0))
    return np.array(corrected)
