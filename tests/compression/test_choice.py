"""From rows to scores, and from scores to the block that goes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.choice import CandidateScore, candidate_scores, choose_block, tied_on_map
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
BY_HAND = {UNDROPPED: (1.0, 1.0), 0: (0.0, 0.0), 2: (0.625, 0.625), 4: (0.5, 0.125)}
"""Candidate -> mAP at 0.5 and 0.75. Candidate 0 has no row."""


@pytest.mark.parametrize("map_tiou", [0.5, 0.75, "average"])
def test_map_scores(map_tiou: Any) -> None:
    scores = candidate_scores(TABLE, "map", (4, 0, 2), experiment(map_tiou=map_tiou), ANNOTATIONS)
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
    scores = candidate_scores(table, "map", (0, 1, 2), experiment(), ANNOTATIONS)
    assert candidate_scores(shuffled, "map", (0, 1, 2), experiment(), ANNOTATIONS) == scores
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
    scores = candidate_scores(table, criterion, (0, 3), experiment(criterion), ANNOTATIONS)
    means = {UNDROPPED: 0.6, 0: 2.25, 3: 1.5}
    expected = [
        CandidateScore(block, means[block], None, means[block] if criterion == "train_loss" else None, 2)
        for block in sorted(values)
    ]
    assert list(scores) == expected
    assert choose_block(scores, ScoringConfig(criterion=criterion)).block == 3


def scores(*given: tuple[int, float, float | None, float | None]) -> list[CandidateScore]:
    """(block, score, average mAP, train loss), and an undropped student that would win everything."""
    undropped = [CandidateScore(UNDROPPED, 1.0, 1.0, 0.0, 2)]
    return undropped + [CandidateScore(block, s, a, loss, 2) for block, s, a, loss in given]


AVERAGE, LOSS, INDEX = "average mAP decided", "train loss decided", "lower index decided"
MAP_CASES = [
    ("the highest wins", [(0, 0.3, 0.1, None), (1, 0.5, 0.1, None), (2, 0.4, 0.9, None)], 1, None),
    ("one candidate", [(7, 0.0, 0.0, None)], 7, None),
    ("average mAP", [(0, 0.9, 0.5, None), (4, 0.9, 0.6, None), (5, 0.8, 0.7, None)], 4,
     f"blocks 0, 4 score 0.9 alike; {AVERAGE}"),
    ("train loss", [(0, 0.9, 0.6, 2.0), (3, 0.9, 0.6, 1.0), (4, 0.9, 0.6, 3.0)], 3,
     f"blocks 0, 3, 4 score 0.9 alike; {LOSS}"),
    ("average mAP comes before train loss", [(0, 0.9, 0.5, 0.1), (3, 0.9, 0.6, 9.0)], 3,
     f"blocks 0, 3 score 0.9 alike; {AVERAGE}"),
    ("average mAP, then train loss", [(0, 0.9, 0.5, None), (3, 0.9, 0.6, 2.0), (4, 0.9, 0.6, 1.0)], 4,
     f"blocks 0, 3, 4 score 0.9 alike; {LOSS}"),
    ("nothing but the index", [(5, 0.9, 0.6, 1.0), (3, 0.9, 0.6, 1.0)], 3,
     f"blocks 5, 3 score 0.9 alike; {INDEX}"),
    ("no loss measured", [(2, 1.0, 1.0, None), (6, 1.0, 1.0, None)], 2,
     f"blocks 2, 6 score 1 alike; {INDEX}"),
    ("all zero", [(1, 0.0, 0.0, None), (4, 0.0, 0.0, None), (8, 0.0, 0.0, None)], 1,
     f"blocks 1, 4, 8 score 0 alike; {INDEX}"),
    ("a measured loss beats none", [(1, 0.5, 0.5, None), (4, 0.5, 0.5, 7.0)], 4,
     f"blocks 1, 4 score 0.5 alike; {LOSS}"),
]  # fmt: skip
VALUE_CASES = [
    ("the lowest wins", [(0, 0.3, None, None), (1, 0.2, None, None), (2, 0.4, None, None)], 1, None),
    ("the lower index", [(6, 0.2, None, 0.2), (2, 0.2, None, 0.2), (1, 0.4, None, 0.4)], 2,
     f"blocks 6, 2 score 0.2 alike; {INDEX}"),
]  # fmt: skip
CASES = [("map", *case) for case in MAP_CASES]
CASES += [(criterion, *case) for criterion in ("train_loss", "mse") for case in VALUE_CASES]


@pytest.mark.parametrize(
    ("criterion", "given", "block", "tie"),
    [pytest.param(c, given, block, tie, id=f"{c}: {name}") for c, name, given, block, tie in CASES],
)
def test_choice(criterion: Any, given: list[Any], block: int, tie: str | None) -> None:
    choice = choose_block(scores(*given), ScoringConfig(criterion=criterion))
    assert (choice.block, choice.tie) == (block, tie)


@pytest.mark.parametrize(
    ("criterion", "given", "expected"),
    [
        ("map", [(0, 0.9, 0.5, None), (3, 0.8, 0.5, None)], ()),
        ("map", [(0, 0.9, 0.5, None), (3, 0.9, 0.6, None)], ()),
        ("map", [(0, 0.9, 0.6, None), (3, 0.9, 0.6, None), (4, 0.9, 0.5, None)], (0, 3)),
        ("map", [(0, 0.2, 0.2, None), (3, 0.2, 0.2, None), (4, 0.9, 0.5, None)], ()),
        ("map", [(5, 0.0, 0.0, None), (3, 0.0, 0.0, None)], (5, 3)),
        ("train_loss", [(0, 0.9, None, 0.9), (3, 0.9, None, 0.9)], ()),
        ("mse", [(0, 0.9, None, None), (3, 0.9, None, None)], ()),
    ],
)
def test_who_needs_a_train_loss(criterion: Any, given: list[Any], expected: tuple[int, ...]) -> None:
    assert tied_on_map(scores(*given), ScoringConfig(criterion=criterion)) == expected


@pytest.mark.parametrize("order", [(0, 3), (3, 0)])
def test_a_loss_that_is_not_a_number_never_wins(order: tuple[int, int]) -> None:
    """Half precision may overflow in one subnet."""
    losses = {0: math.nan, 3: 1.0}
    given = scores(*((block, 0.9, 0.5, losses[block]) for block in order))
    assert choose_block(given, ScoringConfig()).block == 3
    given = scores(*((block, losses[block], None, losses[block]) for block in order))
    assert choose_block(given, ScoringConfig(criterion="train_loss")).block == 3
