"""From a sweep's rows to a score for every candidate, and how sure the differences between them are."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.racing import Lag, loss_lags, map_lags
from pbd_ray.config import Experiment
from pbd_ray.data.annotations import Annotations
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.metrics.intervals import map_difference_interval
from pbd_ray.metrics.mean_ap import Matches, PreparedGroundTruth, match_detections, mean_ap_of
from pbd_ray.metrics.mean_ap import prepare_ground_truth as prepare

Criterion = Literal["map", "train_loss", "mse"]
Floats = npt.NDArray[np.float64]

_RACE, _COMPARE = 0x2ACE, 0xC0DE
"""Keep the draws of racing and of intervals apart from others made with the recipe's seed."""


@dataclass(frozen=True)
class CandidateScore:
    """What a round's sweep says of one candidate."""

    block: int
    """Original index; UNDROPPED for the student itself."""
    score: float
    """By the recipe's criterion: mAP (higher is better), train loss or mse (lower is better)."""
    average_map: float | None
    """Criterion map only."""
    train_loss: float | None
    """Criterion map: only where it was needed to break a tie."""
    videos: int
    """On how many videos."""
    stopped: bool = False
    """Racing ended it after `videos` videos, worse than another beyond doubt: it cannot be chosen."""
    behind: float | None = None
    """How much worse than the block these scores choose on the same videos, in the criterion's units."""
    behind_low: float | None = None
    behind_high: float | None = None
    """Paired bootstrap interval of `behind` over videos, at `evaluation.confidence`: for more videos like
    these. None for the chosen block, the undropped student, and where a loss is not finite."""


@dataclass(frozen=True, eq=False)
class SweepRows:
    """A sweep's rows and what they are rows of."""

    criterion: Criterion
    table: pa.Table
    """Rows of `scoring.score_videos`; an arm may have none for a video in which it detected nothing."""
    videos: Mapping[int, tuple[str, ...]]
    """The videos every arm counts on, by candidate; the undropped student is one but for mse."""
    stopped: frozenset[int] = frozenset()


def candidate_scores(
    sweep: SweepRows, experiment: Experiment, annotations: Annotations
) -> tuple[CandidateScore, ...]:
    """Scores of all arms of a sweep, ascending by block, each on its own videos.

    map: mAP (one ground truth a set of videos). train_loss and mse: mean over videos.
    """
    if sweep.criterion != "map":
        return tuple(_mean_score(sweep, block) for block in sorted(sweep.videos))
    arms, scores = _MapArms(sweep, annotations), []
    for block, videos in sorted(sweep.videos.items()):
        quality = mean_ap_of(arms.matches(block, videos, experiment.evaluation.tious))
        score = quality.at(experiment.scoring.map_tiou)
        stopped = block in sweep.stopped
        scores.append(CandidateScore(block, score, quality.average_map, None, len(videos), stopped))
    return tuple(scores)


def standings(
    sweep: SweepRows, experiment: Experiment, annotations: Annotations, key: tuple[int, ...]
) -> tuple[Lag, ...]:
    """How far every candidate of a sweep is behind the best, towards all videos of `annotations`.

    Args:
        sweep: all its arms on the same videos; the undropped student takes no part.
        key: the draws depend on the recipe's seed and this (the round and the barrier, say).
    """
    blocks = [block for block in sweep.videos if block != UNDROPPED]
    videos, total = sweep.videos[blocks[0]], len(annotations.videos)
    if sweep.criterion != "map":
        return loss_lags({block: _values(sweep, block, videos) for block in blocks}, total)
    racing, tiou = experiment.scoring.racing, experiment.scoring.map_tiou
    assert racing is not None, "racing is off"
    arms = _MapArms(sweep, annotations)
    matches = {block: arms.matches(block, videos, _tious(experiment)) for block in blocks}
    rng = np.random.default_rng(np.random.SeedSequence((experiment.seed, _RACE, *key)))
    return map_lags(matches, tiou, total, rng, racing.replicates)


def compared(
    scores: Sequence[CandidateScore],
    chosen: int,
    sweep: SweepRows,
    experiment: Experiment,
    annotations: Annotations,
) -> tuple[CandidateScore, ...]:
    """The scores with every candidate's distance from the chosen one, on the videos it was scored on.

    Every comparison of one recipe draws with the same seed.
    """
    arms = _MapArms(sweep, annotations) if sweep.criterion == "map" else None

    def compare(score: CandidateScore) -> CandidateScore:
        if score.block in (UNDROPPED, chosen):
            return score
        videos = sweep.videos[score.block]
        rng = np.random.default_rng(np.random.SeedSequence((experiment.seed, _COMPARE)))
        rules = experiment.evaluation
        if arms is None:
            ours, theirs = (_values(sweep, block, videos) for block in (score.block, chosen))
            if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
                return score
            lag = ours - theirs
            drawn = rng.choice(lag, size=(rules.bootstrap_replicates, len(lag))).mean(axis=1)
            tail = (1 - rules.confidence) / 2
            low, high = np.quantile(drawn, [tail, 1 - tail])
            return replace(score, behind=float(lag.mean()), behind_low=float(low), behind_high=float(high))
        first, second = (arms.matches(block, videos, _tious(experiment)) for block in (chosen, score.block))
        found = map_difference_interval(
            first, second, experiment.scoring.map_tiou, rng, rules.bootstrap_replicates, rules.confidence
        )
        return replace(score, behind=found.value, behind_low=found.low, behind_high=found.high)

    return tuple(compare(score) for score in scores)


class _MapArms:
    """Matches of any arm on any of its videos; a set's ground truth is prepared once."""

    def __init__(self, sweep: SweepRows, annotations: Annotations) -> None:
        self._table, self._annotations = sweep.table, annotations
        self._truth = scored_against(annotations)
        self._prepared = functools.cache(self._prepare)
        self._rows = functools.cache(self._rows_of)

    def matches(self, block: int, videos: tuple[str, ...], tious: tuple[float, ...]) -> Matches:
        return match_detections(self._prepared(videos), self._rows(block), tious)

    def _prepare(self, videos: tuple[str, ...]) -> PreparedGroundTruth:
        return prepare(self._truth.ground_truth(), len(self._truth.classes), videos)

    def _rows_of(self, block: int) -> pa.Table:
        return named(self._annotations, self._table.filter(pc.equal(self._table["candidate"], block)))


def _tious(experiment: Experiment) -> tuple[float, ...]:
    tiou = experiment.scoring.map_tiou
    return experiment.evaluation.tious if tiou == "average" else (tiou,)


def _mean_score(sweep: SweepRows, block: int) -> CandidateScore:
    videos = sweep.videos[block]
    mean = float(_values(sweep, block, videos).mean())
    loss = mean if sweep.criterion == "train_loss" else None
    return CandidateScore(block, mean, None, loss, len(videos), block in sweep.stopped)


def _values(sweep: SweepRows, block: int, videos: tuple[str, ...]) -> Floats:
    """(V,) values of an arm in the order of `videos`."""
    rows = sweep.table.filter(pc.equal(sweep.table["candidate"], block))
    at = pc.index_in(pa.array(videos), rows["video"].combine_chunks())
    assert at.null_count == 0, f"candidate {block} has no value of some video"
    values: Floats = rows["value"].to_numpy()[at.to_numpy()]
    return values
