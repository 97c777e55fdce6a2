"""From the rows of evaluation sweeps to a model's mAP and its distance from the teacher. Pure."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbd_ray.config import EvaluationConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.metrics.intervals import MapInterval, map_difference_interval, map_interval
from pbd_ray.metrics.mean_ap import Matches, match_detections, mean_ap_of, prepare_ground_truth
from pbd_ray.search.state import UNDROPPED, Cost, Evaluation, Interval, Model, Verdict

_BOOTSTRAP = 0xB007
"""Keeps the bootstrap's draws apart from others made with the recipe's seed."""


def detections_of(rows: pa.Table) -> pa.Table:
    """DETECTION_SCHEMA rows of the undropped model in a sweep's rows."""
    if "candidate" in rows.column_names:
        rows = rows.filter(pc.equal(rows.column("candidate"), UNDROPPED))
    return rows.select(DETECTION_SCHEMA.names)


def evaluate(
    videos: Annotations,
    rows: pa.Table,
    teacher_rows: pa.Table | None,
    rules: EvaluationConfig,
    seed: int,
    model: Model,
    cost: Cost,
) -> Evaluation:
    """mAP at every tIoU, the headline, cost, and the interval against the teacher.

    Args:
        rows, teacher_rows: what the evaluation sweeps gave; no teacher rows for the teacher itself.
    """
    mean_ap = mean_ap_of(_matches(videos, rows, rules.tious))
    if rules.headline_tiou == "average":
        headline = mean_ap.average_map
    else:
        headline = mean_ap_of(headline_matches(videos, rows, rules)).map[rules.headline_tiou]
    interval = None
    if teacher_rows is not None:
        interval = interval_between(videos, rows, teacher_rows, rules, rules.noninferiority_margin, seed)
    return Evaluation(
        kept_blocks=model.kept_blocks,
        map=mean_ap.map,
        average_map=mean_ap.average_map,
        headline_map=headline,
        macs=cost.macs,
        block_macs=cost.block_macs,
        params=cost.params,
        interval=interval,
    )


def headline_interval(videos: Annotations, rows: pa.Table, rules: EvaluationConfig, seed: int) -> MapInterval:
    """Interval of one model's headline mAP, by a bootstrap over videos."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, _BOOTSTRAP)))
    matches = headline_matches(videos, rows, rules)
    return map_interval(matches, rules.headline_tiou, rng, rules.bootstrap_replicates, rules.confidence)


def interval_between(
    videos: Annotations,
    rows: pa.Table,
    teacher_rows: pa.Table,
    rules: EvaluationConfig,
    margin: float,
    seed: int,
) -> Interval:
    """Headline mAP of a student minus the teacher's on the same videos, by a paired bootstrap over videos.

    Every call with one seed and set of videos draws the same replicates, so rounds compare.
    """
    student, teacher = (headline_matches(videos, arm, rules) for arm in (rows, teacher_rows))
    rng = np.random.default_rng(np.random.SeedSequence((seed, _BOOTSTRAP)))
    found = map_difference_interval(
        student, teacher, rules.headline_tiou, rng, rules.bootstrap_replicates, rules.confidence
    )
    return Interval(
        difference=found.value,
        low=found.low,
        high=found.high,
        confidence=found.confidence,
        videos=found.videos,
        unreliable=found.unreliable,
        margin=margin,
        verdict=_verdict(found.low, found.high, margin),
    )


def headline_matches(videos: Annotations, rows: pa.Table, rules: EvaluationConfig) -> Matches:
    """The undropped model's detections in a sweep's rows, matched at the thresholds of the headline mAP."""
    tious = rules.tious if rules.headline_tiou == "average" else (rules.headline_tiou,)
    return _matches(videos, rows, tious)


def _verdict(low: float, high: float, margin: float) -> Verdict:
    # As metrics.intervals.noninferiority, but a margin of 0 is allowed, and met by an equal student.
    if low >= -margin:
        return "holds"
    return "inferior" if high < -margin else "undecided"


def _matches(videos: Annotations, rows: pa.Table, tious: tuple[float, ...]) -> Matches:
    truth = scored_against(videos)
    ground_truth = prepare_ground_truth(
        truth.ground_truth(), len(truth.classes), [video.id for video in truth.videos]
    )
    return match_detections(ground_truth, named(videos, detections_of(rows)), tious)
