"""From the rows of evaluation sweeps to a model's mAP and its distance from the teacher. Pure."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pbd_ray.config import EvaluationConfig, GuardrailsConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.metrics.bootstrap import evaluation_draws
from pbd_ray.metrics.detad import missed_instances
from pbd_ray.metrics.detad_rules import BUILT_IN
from pbd_ray.metrics.guards import Guard, class_loss_guards, false_negative_guards
from pbd_ray.metrics.intervals import MapInterval, map_difference_interval, map_interval, noninferiority
from pbd_ray.metrics.mean_ap import Matches, match_detections, mean_ap_of, prepare_ground_truth
from pbd_ray.search.state import UNDROPPED, Cost, Evaluation, Interval, Model


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
    matches = headline_matches(videos, rows, rules)
    draws = (evaluation_draws(seed), rules.bootstrap_replicates, rules.confidence)
    return map_interval(matches, rules.headline_tiou, *draws)


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
    found = map_difference_interval(
        student,
        teacher,
        rules.headline_tiou,
        evaluation_draws(seed),
        rules.bootstrap_replicates,
        rules.confidence,
    )
    return Interval(
        difference=found.value,
        low=found.low,
        high=found.high,
        confidence=found.confidence,
        videos=found.videos,
        unreliable=found.unreliable,
        dropped_classes=found.dropped_classes,
        margin=margin,
        verdict=noninferiority(found.low, found.high, margin),
    )


def guards_between(
    videos: Annotations,
    rows: pa.Table,
    teacher_rows: pa.Table,
    rules: EvaluationConfig,
    guardrails: GuardrailsConfig,
    seed: int,
) -> tuple[Guard, ...]:
    """The guards that the recipe asks for, on the replicates of `interval_between`."""
    guards: list[Guard] = []
    draws = rules.bootstrap_replicates, rules.confidence
    truth = scored_against(videos)
    limit = guardrails.max_class_loss
    if limit is not None:
        student, teacher = (headline_matches(videos, arm, rules) for arm in (rows, teacher_rows))
        guards += class_loss_guards(
            student, teacher, rules.headline_tiou, truth.classes, limit, evaluation_draws(seed), *draws
        )
    limit = guardrails.max_false_negative_rise
    if limit is not None:
        ours, theirs = (
            missed_instances(truth, named(videos, detections_of(arm)), BUILT_IN[guardrails.detad])
            for arm in (rows, teacher_rows)
        )
        guards += false_negative_guards(ours, theirs, limit, evaluation_draws(seed), *draws)
    return tuple(guards)


def headline_matches(videos: Annotations, rows: pa.Table, rules: EvaluationConfig) -> Matches:
    """The undropped model's detections in a sweep's rows, matched at the thresholds of the headline mAP."""
    tious = rules.tious if rules.headline_tiou == "average" else (rules.headline_tiou,)
    return _matches(videos, rows, tious)


def _matches(videos: Annotations, rows: pa.Table, tious: tuple[float, ...]) -> Matches:
    truth = scored_against(videos)
    ground_truth = prepare_ground_truth(
        truth.ground_truth(), len(truth.classes), [video.id for video in truth.videos]
    )
    return match_detections(ground_truth, named(videos, detections_of(rows)), tious)
