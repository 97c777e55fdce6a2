"""What if another metric had chosen? Every round's choice again, from the detections that scoring stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbd_ray.config import ConfigError, Experiment
from pbd_ray.data.annotations import Annotations
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.metrics.bootstrap import evaluation_draws
from pbd_ray.metrics.intervals import map_difference_interval
from pbd_ray.metrics.mean_ap import Matches, match_detections, mean_ap_of, prepare_ground_truth
from pbd_ray.metrics.ranks import kendall_tau
from pbd_ray.report.whatif import ReplayedMetric, ReplayedRound
from pbd_ray.search.annotated import recorded_split
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.round_folder import RoundFolder
from pbd_ray.search.slices import scoring_videos
from pbd_ray.search.state import UNDROPPED, Decision


def replay(
    ledger: Ledger, tious: Sequence[float], classes: Sequence[str] | None = None
) -> tuple[ReplayedRound, ...]:
    """Every committed round that scored by mAP, by mAP at each of `tious` and by their average.

    Args:
        classes: count only these; None: all.

    Raises:
        ConfigError: a class that the run does not know, or that has no instance among the scoring videos.
        LedgerError: the run directory is not what was committed.
    """
    experiment, fit = ledger.recipe().experiment, recorded_split(ledger).fit
    videos = scoring_videos(fit, experiment.scoring.video_fraction, experiment.seed)
    truth = scored_against(videos)
    labels = _labels(truth, classes)
    found = []
    for record in ledger.committed():
        folder, decision = ledger.round(record.round), record.decision
        # A runner-up is tried on the scores of the round that was rolled back.
        if decision is not None and decision.criterion == "map" and folder.read_plan("scores") is not None:
            arms = _arms(folder, decision, videos, _only(truth, labels), labels, tious)
            found.append(_round(decision, arms, tious, experiment))
    return tuple(found)


def _round(
    decision: Decision, arms: Mapping[int, Matches], tious: Sequence[float], experiment: Experiment
) -> ReplayedRound:
    quality = {block: mean_ap_of(matches) for block, matches in arms.items()}
    own = {score.block: score.score for score in decision.scores}
    rules, went = experiment.evaluation, decision.dropped_block
    metrics = []
    thresholds: tuple[float | Literal["average"], ...] = (*tious, "average") if len(tious) > 1 else (*tious,)
    for tiou in thresholds:
        scores = {block: one.at(tiou) for block, one in quality.items()}
        best = min(scores, key=lambda b: (-scores[b], -quality[b].average_map, b != went, b))
        lead = None
        if best != went:
            rng = evaluation_draws(experiment.seed)
            sizes = (rules.bootstrap_replicates, rules.confidence)
            lead = map_difference_interval(arms[best], arms[went], tiou, rng, *sizes)
        tau = kendall_tau([own[block] for block in scores], list(scores.values()))
        name = "average mAP" if tiou == "average" else f"mAP@{tiou:g}"
        metrics.append(ReplayedMetric(name, best, lead, tau))
    stopped = tuple(score.block for score in decision.scores if score.stopped)
    return ReplayedRound(decision.round, went, len(arms) + len(stopped), stopped, tuple(metrics))


def _arms(
    folder: RoundFolder,
    decision: Decision,
    videos: Annotations,
    truth: Annotations,
    labels: Sequence[int],
    tious: Sequence[float],
) -> dict[int, Matches]:
    """Matches of every candidate that was scored on all videos."""
    rows = folder.read_slices("scores")
    prepared = prepare_ground_truth(
        truth.ground_truth(), len(truth.classes), [video.id for video in truth.videos]
    )
    arms = {}
    for score in decision.scores:
        if score.block != UNDROPPED and not score.stopped:
            mine = named(videos, rows.filter(pc.equal(rows["candidate"], score.block)))
            arms[score.block] = match_detections(prepared, _relabelled(mine, labels), tious)
    return arms


def _labels(truth: Annotations, classes: Sequence[str] | None) -> tuple[int, ...]:
    if classes is None:
        return tuple(range(len(truth.classes)))
    for name in classes:
        if name not in truth.classes:
            raise ConfigError(f"--replay classes: {name!r} is none of the run's {len(truth.classes)} classes")
    labels = tuple(truth.classes.index(name) for name in dict.fromkeys(classes))
    present = {label for video in truth.videos for label in video.labels.tolist()}
    if not present & set(labels):
        raise ConfigError(f"--replay classes: no scoring video has an instance of {', '.join(classes)}")
    return labels


def _only(truth: Annotations, labels: Sequence[int]) -> Annotations:
    """The instances of some classes, which are then all there are."""
    videos = []
    for video in truth.videos:
        kept = np.isin(video.labels, labels)
        renamed = np.array([labels.index(label) for label in video.labels[kept].tolist()], dtype=np.int32)
        videos.append(replace(video, segments_seconds=video.segments_seconds[kept], labels=renamed))
    return replace(truth, classes=tuple(truth.classes[label] for label in labels), videos=tuple(videos))


def _relabelled(detections: pa.Table, labels: Sequence[int]) -> pa.Table:
    """The detections of some classes, labels as `_only` counts them."""
    place = pc.index_in(detections["label"], pa.array(labels, detections["label"].type))
    at = detections.column_names.index("label")
    kept = pc.is_valid(place)
    return detections.set_column(at, "label", place).filter(kept)
