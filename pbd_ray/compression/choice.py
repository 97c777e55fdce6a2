"""From a sweep's rows to a score for every candidate, and from the scores to the block that goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.config import Experiment, ScoringConfig
from pbd_ray.data.annotations import Annotations
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.metrics.mean_ap import mean_average_precision, prepare_ground_truth

Criterion = Literal["map", "train_loss", "mse"]


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


@dataclass(frozen=True)
class Choice:
    """The block whose removal hurts least."""

    block: int
    tie: str | None
    """How a tie was broken, one sentence; None where there was none."""


def candidate_scores(
    table: pa.Table,
    criterion: Criterion,
    candidates: Sequence[int],
    experiment: Experiment,
    annotations: Annotations,
) -> tuple[CandidateScore, ...]:
    """Scores of all candidates of a sweep, ascending by block, the undropped student first (not for mse).

    map: mAP on `annotations` (one ground truth, prepared once). train_loss and mse: mean over videos.

    Args:
        table: rows of `score_videos` for every video of `annotations`.
        candidates: blocks that were scored; one may have no row, having detected nothing.
    """
    if criterion == "map":
        return _map_scores(table, sorted({UNDROPPED, *candidates}), experiment, annotations)
    means = table.group_by("candidate").aggregate([("value", "mean"), ("video", "count_distinct")])
    return tuple(
        CandidateScore(
            block=row["candidate"],
            score=row["value_mean"],
            average_map=None,
            train_loss=row["value_mean"] if criterion == "train_loss" else None,
            videos=row["video_count_distinct"],
        )
        for row in means.sort_by("candidate").to_pylist()
    )


def choose_block(scores: Sequence[CandidateScore], scoring: ScoringConfig) -> Choice:
    """The candidate that hurts least (design, section 2, scoring criteria).

    Ties: for map the better average mAP, then the lower train loss where it was measured; then, for
    every criterion, the lower index. That also decides where all candidates score 0 mAP.
    """
    candidates = [score for score in scores if score.block != UNDROPPED]
    best = min(candidates, key=lambda score: _preference(score, scoring))
    first = _preference(best, scoring)[0]
    tied = [score for score in candidates if _preference(score, scoring)[0] == first]
    return Choice(best.block, _explain(best, tied, scoring) if len(tied) > 1 else None)


def tied_on_map(scores: Sequence[CandidateScore], scoring: ScoringConfig) -> tuple[int, ...]:
    """Candidates that neither the score nor average mAP tells apart; empty where one leads.

    Only these need a train loss, and only for criterion map.
    """
    if scoring.criterion != "map":
        return ()
    candidates = [score for score in scores if score.block != UNDROPPED]
    leader = min(_preference(score, scoring)[:2] for score in candidates)
    tied = tuple(score.block for score in candidates if _preference(score, scoring)[:2] == leader)
    return tied if len(tied) > 1 else ()


def _map_scores(
    table: pa.Table, blocks: Sequence[int], experiment: Experiment, annotations: Annotations
) -> tuple[CandidateScore, ...]:
    videos = [video.id for video in annotations.videos]
    truth = scored_against(annotations)
    num_classes = len(truth.classes)
    ground_truth = prepare_ground_truth(truth.ground_truth(), num_classes, videos)
    scores = []
    for block in blocks:
        detections = named(annotations, table.filter(pc.equal(table["candidate"], block)))
        quality = mean_average_precision(ground_truth, detections, experiment.evaluation.tious, num_classes)
        score = quality.at(experiment.scoring.map_tiou)
        scores.append(CandidateScore(block, score, quality.average_map, None, len(videos)))
    return tuple(scores)


def _preference(score: CandidateScore, scoring: ScoringConfig) -> tuple[float, float, float, int]:
    """Sorts the preferred candidate first: score, average mAP, train loss, index."""
    if scoring.criterion == "map":
        return (-score.score, -(score.average_map or 0.0), _loss(score.train_loss), score.block)
    return (_loss(score.score), 0.0, 0.0, score.block)


def _loss(value: float | None) -> float:
    """A loss that was not measured or is not a number is the worst: NaN compares with nothing."""
    return math.inf if value is None or math.isnan(value) else value


def _explain(best: CandidateScore, tied: Sequence[CandidateScore], scoring: ScoringConfig) -> str:
    blocks = ", ".join(str(score.block) for score in tied)
    ours = _preference(best, scoring)
    rivals = [_preference(score, scoring) for score in tied if score.block != best.block]
    names = ("score", "average mAP", "train loss", "lower index")
    deciding = next(i for i in range(1, 4) if all(rival[: i + 1] != ours[: i + 1] for rival in rivals))
    return f"blocks {blocks} score {best.score:.6g} alike; {names[deciding]} decided"
