"""From a sweep's rows to scores and to how sure their differences are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.candidates import (
    CandidateScore,
    SweepRows,
    candidate_scores,
    compared,
    standings,
)
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


def random_sweep(videos: int, skills: dict[int, float]) -> tuple[SweepRows, Annotations]:
    """One instance a video; a candidate finds it with the chance of its skill, the same luck for all."""
    rng = np.random.default_rng(7)
    luck = rng.random((2, videos))
    names = [f"v{index:02d}" for index in range(videos)]
    made = [video(name, [(2.0, 6.0)], [0]) for name in names]
    made.append(video("run", [(1.0, 2.0)], [1]))  # each class has an instance; nobody finds this one
    listed = [
        row
        for block, skill in skills.items()
        for index, name in enumerate(names)
        for row in rows(
            block, (name, *((2.0, 6.0) if luck[0, index] < skill else (9.0, 12.0)), 0, luck[1, index])
        )
    ]
    table = pa.Table.from_pylist(listed, schema=CANDIDATE_DETECTION_SCHEMA)
    ids = (*names, "run")
    return SweepRows("map", table, dict.fromkeys(skills, ids)), Annotations(CLASSES, tuple(made))


def test_distance_from_the_chosen_block_is_on_the_candidates_own_videos() -> None:
    """Candidate 5 was stopped after eleven videos: the chosen one is scored on these, too."""
    swept, annotations = random_sweep(30, {UNDROPPED: 0.95, 1: 0.9, 3: 0.5, 5: 0.3})
    few = (*(f"v{index:02d}" for index in range(10)), "run")
    swept = replace(swept, videos={**swept.videos, 5: few}, stopped=frozenset({5}))
    given = candidate_scores(swept, experiment(), annotations)
    assert [(score.block, score.videos, score.stopped) for score in given] == [
        (UNDROPPED, 31, False),
        (1, 31, False),
        (3, 31, False),
        (5, 11, True),
    ]
    found = {score.block: score for score in compared(given, 1, swept, experiment(), annotations)}
    assert found[UNDROPPED].behind is None and found[1].behind is None

    def quality(block: int, videos: tuple[str, ...]) -> float:
        mine = swept.table.filter(pc.equal(swept.table["candidate"], block)).drop_columns("candidate")
        truth = annotations.ground_truth()
        return mean_average_precision(truth, mine, (0.5,), 2, videos=videos).map[0.5]

    for block in (3, 5):
        videos = swept.videos[block]
        expected = quality(1, videos) - quality(block, videos)
        assert found[block].behind == pytest.approx(expected)
        assert 0 < found[block].behind_low < expected < found[block].behind_high


def test_distance_of_losses() -> None:
    """Mean of paired differences; the interval is about two standard errors wide on both sides."""
    rng = np.random.default_rng(0)
    names = tuple(f"v{index:03d}" for index in range(100))
    base = rng.normal(5, 3, size=100)
    losses = {UNDROPPED: base - 1, 2: base, 4: base + rng.normal(0.3, 1.0, size=100)}
    table = pa.Table.from_pylist(
        [
            {"video": name, "candidate": block, "value": value}
            for block, values in losses.items()
            for name, value in zip(names, values, strict=True)
        ],
        schema=VALUE_SCHEMA,
    ).take(rng.permutation(300))
    swept = SweepRows("train_loss", table, dict.fromkeys(losses, names))
    settings, annotations = experiment("train_loss"), ANNOTATIONS
    found = compared(candidate_scores(swept, settings, annotations), 2, swept, settings, annotations)
    far = next(score for score in found if score.block == 4)
    differences = losses[4] - losses[2]
    error = differences.std(ddof=1) / 10
    assert far.behind == pytest.approx(differences.mean())
    assert far.behind_low == pytest.approx(differences.mean() - 1.96 * error, abs=0.3 * error)
    assert far.behind_high == pytest.approx(differences.mean() + 1.96 * error, abs=0.3 * error)


def test_distance_from_a_loss_that_is_not_a_number() -> None:
    rows_ = [
        {"video": name, "candidate": block, "value": value}
        for name in "ab"
        for block, value in ((UNDROPPED, 1.0), (0, 2.0), (3, float("nan")))
    ]
    table = pa.Table.from_pylist(rows_, schema=VALUE_SCHEMA)
    swept = SweepRows("train_loss", table, dict.fromkeys((UNDROPPED, 0, 3), ("a", "b")))
    settings = experiment("train_loss")
    found = compared(candidate_scores(swept, settings, ANNOTATIONS), 0, swept, settings, ANNOTATIONS)
    assert [score.behind for score in found] == [None, None, None]


@pytest.mark.parametrize("map_tiou", [0.5, "average"])
def test_standings(map_tiou: Any) -> None:
    """The best leads, by the recipe's threshold; the undropped student takes no part; draws are fixed."""
    swept, annotations = random_sweep(30, {UNDROPPED: 1.0, 1: 0.5, 3: 0.9})
    settings = experiment(map_tiou=map_tiou)
    lags = standings(swept, settings, annotations, (1, 0))
    assert [lag.block for lag in lags] == [1, 3]
    assert lags[1].behind == 0 and lags[0].behind > 0.1
    assert standings(swept, settings, annotations, (1, 0)) == lags
    part = replace(swept, videos=dict.fromkeys((1, 3), (*swept.videos[1][:15], "run")))
    other = standings(part, settings, annotations, (1, 0))
    assert other[0].standard_error > 0 == lags[0].standard_error  # nothing is left to be seen of all
    assert standings(part, settings, annotations, (1, 1)) != other
