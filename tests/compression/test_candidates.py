"""From a sweep's rows to scores and to how sure their differences are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.candidates import CandidateScore, SweepRows, candidate_scores
from pbd_ray.compression.scoring import CANDIDATE_DETECTION_SCHEMA, VALUE_SCHEMA
from pbd_ray.config import DataConfig, EvaluationConfig, Experiment, ScoringConfig
from pbd_ray.data.annotations import Annotations, Video
from pbd_ray.metrics.mean_ap import mean_average_precision

CLASSES = ("jump", "run")


def video(name: str, segments: list[tuple[float, float]], labels: list[int]) -> Video:
    return Video(
        id=name,
        path=f"{name}.mp4",
        subset="fit",
        duration_seconds=20.0,
        fps=10.0,
        frames=200,
        segments_seconds=np.array(segments, dtype=np.float64).reshape(-1, 2),
        labels=np.array(labels, dtype=np.int32),
    )


ANNOTATIONS = Annotations(CLASSES, (video("a", [(0, 10), (12, 16)], [0, 1]), video("b", [(5, 9)], [0])))


def experiment(criterion: str = "map", map_tiou: Any = 0.5) -> Experiment:
    return Experiment(
        name="choice",
        data=DataConfig(),
        scoring=ScoringConfig(criterion=criterion, map_tiou=map_tiou),  # type: ignore[arg-type]
        evaluation=EvaluationConfig(tious=(0.5, 0.75), headline_tiou=0.5),
    )


def rows(candidate: int, *detections: tuple[str, float, float, int, float]) -> list[dict[str, Any]]:
    names = ("video", "start", "end", "label", "score")
    return [{**dict(zip(names, row, strict=True)), "candidate": candidate} for row in detections]


TABLE = pa.Table.from_pylist(
    [
        # Everything found: AP 1 of both classes at both thresholds.
        *rows(UNDROPPED, ("a", 0, 10, 0, 0.9), ("b", 5, 9, 0, 0.8), ("a", 12, 16, 1, 0.7)),
        # jump: (0, 6) has tIoU 0.6 with (0, 10); b is found. At 0.5 AP 1; at 0.75 the false positive ranks
        # first, so precision 1/2 for half of the recall: 1/4. run: not found.
        *rows(4, ("a", 0, 6, 0, 0.9), ("b", 5, 9, 0, 0.8)),
        # jump: a false positive first, then b: 1/4. run: found.
        *rows(2, ("b", 12, 16, 0, 0.9), ("b", 5, 9, 0, 0.8), ("a", 12, 16, 1, 0.1)),
    ],
    schema=CANDIDATE_DETECTION_SCHEMA,
)


def sweep(table: pa.Table, *candidates: int) -> SweepRows:
    return SweepRows("map", table, dict.fromkeys((UNDROPPED, *candidates), ("a", "b")))


BY_HAND = {UNDROPPED: (1.0, 1.0), 0: (0.0, 0.0), 2: (0.625, 0.625), 4: (0.5, 0.125)}
"""Candidate -> mAP at 0.5 and 0.75. Candidate 0 has no row."""


@pytest.mark.parametrize("map_tiou", [0.5, 0.75, "average"])
def test_map_scores(map_tiou: Any) -> None:
    scores = candidate_scores(sweep(TABLE, 4, 0, 2), experiment(map_tiou=map_tiou), ANNOTATIONS)
    assert [score.block for score in scores] == [UNDROPPED, 0, 2, 4]
    for score in scores:
        at_half, at_three_quarters = BY_HAND[score.block]
        average = (at_half + at_three_quarters) / 2
        expected = {0.5: at_half, 0.75: at_three_quarters, "average": average}[map_tiou]
        assert score == CandidateScore(score.block, pytest.approx(expected), pytest.approx(average), None, 2)


def test_map_scores_are_those_of_the_metric() -> None:
    """Random detections, candidate by candidate; the order of rows does not matter."""
    rng = np.random.default_rng(0)
    made = [
        ("ab"[rng.integers(2)], start, start + rng.uniform(1, 8), int(rng.integers(2)), rng.random())
        for start in rng.uniform(0, 14, size=400)
    ]
    listed = [row for index, one in enumerate(made) for row in rows(index % 4 - 1, one)]
    table = pa.Table.from_pylist(listed, schema=CANDIDATE_DETECTION_SCHEMA)
    shuffled = table.take(rng.permutation(table.num_rows))
    scores = candidate_scores(sweep(table, 0, 1, 2), experiment(), ANNOTATIONS)
    assert candidate_scores(sweep(shuffled, 0, 1, 2), experiment(), ANNOTATIONS) == scores
    for score in scores:
        mine = pa.Table.from_pylist([row for row in listed if row["candidate"] == score.block], table.schema)
        quality = mean_average_precision(
            ANNOTATIONS.ground_truth(), mine.drop_columns("candidate"), (0.5, 0.75), 2, videos=["a", "b"]
        )
        assert (score.score, score.average_map) == (quality.map[0.5], quality.average_map)
    assert len({score.score for score in scores}) == 4


@pytest.mark.parametrize(("criterion", "undropped"), [("train_loss", True), ("mse", False)])
def test_value_scores(criterion: Any, undropped: bool) -> None:
    """Mean over videos; mse has no undropped student."""
    values = {UNDROPPED: (0.5, 0.7)} if undropped else {}
    values |= {3: (1.0, 2.0), 0: (4.0, 0.5)}
    table = pa.Table.from_pylist(
        [
            {"video": name, "candidate": candidate, "value": value}
            for candidate, pair in values.items()
            for name, value in zip("ab", pair, strict=True)
        ],
        schema=VALUE_SCHEMA,
    )
    rows_ = SweepRows(criterion, table, dict.fromkeys(values, ("a", "b")))
    scores = candidate_scores(rows_, experiment(criterion), ANNOTATIONS)
    means = {UNDROPPED: 0.6, 0: 2.25, 3: 1.5}
    expected = [
        CandidateScore(block, means[block], None, means[block] if criterion == "train_loss" else None, 2)
        for block in sorted(values)
    ]
    assert list(scores) == expected
