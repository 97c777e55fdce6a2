"""Racing: which candidates are worse than the best beyond doubt before all videos have been seen.

Videos come in a fixed random order and in stages. At the barrier after a stage every candidate is compared
with the leader on the videos seen so far, a random subset, drawn without replacement, of the finite scoring
set, whose whole score is what exhaustive scoring would give (Hoeffding races: Maron and Moore 1994; with
paired tests: Birattari et al. 2002, F-Race). The error rate is spent over the barriers in equal parts and
within a barrier by Holm's step-down rule, so it bounds the chance that the truly best candidate is stopped
anywhere on the way.

Everything here is pure: a decision depends on the rows and the recipe's seed, never on timing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from pbd_ray.config import RacingConfig
from pbd_ray.metrics.intervals import WeightedAP, mean_of_classes
from pbd_ray.metrics.mean_ap import Matches

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FIRST_SHARE = 1 / 16
"""The first barrier comes after this share of the videos, or after `min_videos` where that is more."""
CHUNK = 128
"""Subsamples computed at a time."""


@dataclass(frozen=True)
class Lag:
    """How far a candidate is behind the leader on the same videos."""

    block: int
    behind: float
    """In the criterion's units, positive where the candidate is worse; 0 for the leader."""
    standard_error: float
    """Of `behind` as an estimate of its value on the whole scoring set."""
    p_value: float
    """One-sided: the chance of lying so far behind without being worse on the whole scoring set."""


def barriers(instances: Ints, config: RacingConfig) -> tuple[int, ...]:
    """After how many videos candidates are compared; ascending, empty where the set is too small to race.

    The first one has FIRST_SHARE of the videos, each further one twice as many; those before `min_videos`
    videos or `min_instances` instances of every class are left out. Depends on annotations alone, so the
    error rate can be divided among all barriers beforehand.

    Args:
        instances: (V, C) instances of each class in the videos, in the order in which they are scored.
    """
    videos = len(instances)
    enough = np.minimum(config.min_instances, instances.sum(axis=0))
    ready = int((np.cumsum(instances, axis=0) >= enough).all(axis=1).argmax()) + 1 if videos else 0
    cut = max(config.min_videos, math.ceil(videos * FIRST_SHARE), ready)
    found = []
    while cut < videos:
        found.append(cut)
        cut *= 2
    return tuple(found)


def map_lags(
    arms: Mapping[int, Matches],
    tiou: float | Literal["average"],
    total_videos: int,
    rng: np.random.Generator,
    replicates: int,
) -> tuple[Lag, ...]:
    """How far each candidate's mAP is behind the best one's; ascending by block.

    The standard error is that of a paired bootstrap over videos without replacement: every replicate scores
    all candidates on the same m of the n videos seen. With m = nN / (2N - n) the variance of a mean over m
    of n equals that of n of N, the uncertainty that is left (finite population of N videos), and it
    vanishes at n = N. A video brings all its windows and detections; a class without an instance in a
    replicate leaves every arm. A video is never drawn twice, so average precision sees no copies.

    Args:
        arms: by candidate, all matched on the same n videos with the same ground truth.
        tiou: one of the thresholds they were matched at, or 'average'.
        total_videos: N.
    """
    units = next(iter(arms.values())).ground_truth.videos
    curves = {block: WeightedAP(arms[block], units) for block in sorted(arms)}
    tious = next(iter(arms.values())).tious
    rows = [row for row, matched in enumerate(tious) if tiou in ("average", matched)]

    def scores(weights: Floats) -> Floats:
        return np.stack([mean_of_classes(curve(weights)[:, rows]) for curve in curves.values()])

    seen = len(units)
    size = max(1, min(seen - 1, round(seen * total_videos / (2 * total_videos - seen))))
    value = scores(np.ones((1, seen)))[:, 0]
    drawn = np.concatenate([scores(weights) for weights in _subsamples(seen, size, replicates, rng)], axis=1)
    drawn = drawn[:, ~np.isnan(drawn).any(axis=0)]  # a subsample without any instance has no mAP
    leader = int(value.argmax())
    spread = (drawn[leader] - drawn).std(axis=1) if drawn.shape[1] else np.full(len(value), math.inf)
    left = _uncertainty(seen, total_videos) / _uncertainty(size, seen)  # 1 but for the rounding of `size`
    return _lags(tuple(curves), value[leader] - value, spread * math.sqrt(left), seen)


def loss_lags(arms: Mapping[int, Floats], total_videos: int) -> tuple[Lag, ...]:
    """How far each candidate's mean loss is above the best one's; ascending by block.

    A mean over videos is additive: the paired standard error is the textbook one with the correction for a
    finite population, and no replicates are needed. A candidate with a loss that is not finite is behind
    by infinity.

    Args:
        arms: by candidate, (n,) losses of the same videos in the same order.
        total_videos: N.
    """
    blocks = tuple(sorted(arms))
    losses = np.stack([arms[block] for block in blocks])
    means = np.where(np.isfinite(losses).all(axis=1), losses.mean(axis=1), math.inf)
    leader = int(means.argmin())
    if not math.isfinite(means[leader]):
        return tuple(Lag(block, 0.0, math.inf, 1.0) for block in blocks)
    seen = losses.shape[1]
    with np.errstate(invalid="ignore"):
        spread = (losses - losses[leader]).std(axis=1, ddof=1) * math.sqrt(_uncertainty(seen, total_videos))
    behind = means - means[leader]
    return _lags(blocks, behind, np.where(np.isfinite(behind), spread, 0.0), seen)


def beyond_doubt(lags: Sequence[Lag], level: float) -> tuple[int, ...]:
    """Candidates to stop: worse than the leader at a family-wise error of `level` (Holm 1979).

    The family are the comparisons of one barrier, all candidates but the leader. Its smallest p-value has
    to pass level / (k - 1) of k candidates, which also pays for the leader having been picked by the same
    scores: the truly best candidate can only be stopped in one of k - 1 comparisons.
    """
    ranked = sorted((lag for lag in lags if lag.behind > 0), key=lambda lag: (lag.p_value, lag.block))
    found = []
    for place, lag in enumerate(ranked):
        if lag.p_value > level / (len(lags) - 1 - place):
            break
        found.append(lag.block)
    return tuple(sorted(found))


def _lags(blocks: Sequence[int], behind: Floats, errors: Floats, seen: int) -> tuple[Lag, ...]:
    return tuple(
        Lag(block, float(lag), float(error), _p_value(float(lag), float(error), seen - 1))
        for block, lag, error in zip(blocks, behind, errors, strict=True)
    )


def _p_value(behind: float, standard_error: float, degrees: int) -> float:
    """Upper tail of Student's t. The tail of the replicates themselves would be too thin where few videos
    make the difference: each of them is in most replicates."""
    if behind <= 0:
        return 1.0
    if standard_error == 0:
        return 0.0
    if degrees < 1 or not math.isfinite(standard_error):
        return 1.0
    t = behind / standard_error
    # Wallace (1959): a t as a normal deviate, closer than 0.02 at 5 degrees and more; scipy is no dependency.
    normal = (8 * degrees + 1) / (8 * degrees + 3) * math.sqrt(degrees * math.log1p(t * t / degrees))
    return NormalDist().cdf(-normal)


def _uncertainty(seen: int, total: int) -> float:
    """Variance of a mean over `seen` of `total` values, drawn without replacement, in units of theirs."""
    return 1 / seen - 1 / total


def _subsamples(videos: int, size: int, replicates: int, rng: np.random.Generator) -> Sequence[Floats]:
    """0/1 weights (R, V) in chunks, `size` of the videos in each."""
    chunks = []
    for begin in range(0, replicates, CHUNK):
        order = rng.permuted(np.tile(np.arange(videos), (min(CHUNK, replicates - begin), 1)), axis=1)
        chunks.append((order < size).astype(np.float64))
    return chunks
