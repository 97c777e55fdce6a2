"""Bootstrap intervals against replicated data sets, and their verdicts."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.data.annotations import DETECTION_SCHEMA, GROUND_TRUTH_SCHEMA
from pbd_ray.metrics.intervals import (
    WeightedAP,
    difference_intervals,
    map_difference_interval,
    map_interval,
    noninferiority,
)
from pbd_ray.metrics.mean_ap import (
    Matches,
    MetricError,
    match_detections,
    mean_average_precision,
    prepare_ground_truth,
)

TIOUS = (0.3, 0.5)


def tables(seed: int, videos: int, classes: int = 3, noise: float = 1.0) -> tuple[pa.Table, pa.Table]:
    """Ground truth of `seed % 100`, detections that blur it by `noise` seconds, drawn from `seed`."""
    layout, rng = np.random.default_rng(seed % 100), np.random.default_rng(seed + 1)
    truth: list[tuple[Any, ...]] = []
    found: list[tuple[Any, ...]] = []
    for video in range(videos):
        for _ in range(4):
            start, label = layout.uniform(0, 40), int(layout.integers(classes))
            end = start + layout.uniform(2, 6)
            truth.append((f"v{video}", start, end, label))
            for _ in range(3):
                shift = rng.normal(0, noise, 2)
                found.append((f"v{video}", start + shift[0], end + shift[1], label, rng.uniform()))
        for _ in range(5):
            start = rng.uniform(0, 40)
            found.append((f"v{video}", start, start + 3.0, int(rng.integers(classes)), rng.uniform()))
    return (
        pa.table(list(map(list, zip(*truth, strict=True))), schema=GROUND_TRUTH_SCHEMA),
        pa.table(list(map(list, zip(*found, strict=True))), schema=DETECTION_SCHEMA),
    )


def matched(seed: int, videos: int, **options: Any) -> Matches:
    truth, found = tables(seed, videos, **options)
    return match_detections(prepare_ground_truth(truth, options.get("classes", 3)), found, TIOUS)


def replicate(table: pa.Table, videos: tuple[str, ...], weights: np.ndarray) -> pa.Table:
    """The table with every video copied under a new name as often as its weight says."""
    copies = []
    for video, weight in zip(videos, weights, strict=True):
        mine = table.filter(pa.compute.equal(table["video"], video))
        for copy in range(int(weight)):
            copies.append(mine.set_column(0, "video", pa.array([f"{video}#{copy}"] * len(mine), pa.string())))
    return pa.concat_tables(copies)


@pytest.mark.parametrize("seed", range(4))
def test_a_weighting_is_a_replicated_data_set(seed: int) -> None:
    truth, found = tables(seed, videos=7)
    foreign = found.slice(0, 3).set_column(0, "video", pa.array(["unlabelled"] * 3))
    found = pa.concat_tables([found, foreign])
    matches = match_detections(prepare_ground_truth(truth, 3), found, TIOUS)
    units = (*matches.ground_truth.videos, "unlabelled")
    assert matches.foreign_videos == ("unlabelled",)
    weights = np.random.default_rng(seed).integers(0, 4, (5, len(units)))
    weights[0] = 1
    aps = WeightedAP(matches, units)(weights.astype(float))
    for row, ap in zip(weights, aps, strict=True):
        copied = mean_average_precision(replicate(truth, units, row), replicate(found, units, row), TIOUS, 3)
        present = ~np.isnan(ap)
        np.testing.assert_allclose(ap[present], copied.ap[present], atol=1e-12)
        assert np.isnan(copied.ap[~present]).all()


def test_interval_of_one_detector() -> None:
    truth, found = tables(3, videos=30)
    matches = match_detections(prepare_ground_truth(truth, 3), found, TIOUS)
    scored = mean_average_precision(truth, found, TIOUS, 3)
    for tiou in (0.3, 0.5, "average"):
        interval = map_interval(matches, tiou, np.random.default_rng(0), replicates=300)
        assert interval.value == pytest.approx(scored.at(tiou), abs=1e-12)
        assert interval.low < interval.value < interval.high
        assert not interval.unreliable and interval.videos == 30 and interval.replicates == 300
        assert interval == map_interval(matches, tiou, np.random.default_rng(0), replicates=300)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_methods_against_their_definition(method: Any) -> None:
    first, second = matched(3, 12), matched(103, 12, noise=1.5)
    units = first.ground_truth.videos
    rng = np.random.default_rng(5)
    interval = map_difference_interval(first, second, 0.5, rng, replicates=200, confidence=0.9, method=method)

    def difference(weights: np.ndarray) -> float:
        means = [
            np.nanmean(WeightedAP(arm, units)(weights[None].astype(float))[0, 1]) for arm in (first, second)
        ]
        return float(means[0] - means[1])

    rng = np.random.default_rng(5)
    counts = []
    for rows in (128, 72):
        counts.extend(np.bincount(draw, minlength=12) for draw in rng.integers(12, size=(rows, 12)))
    drawn = np.array([difference(row) for row in counts])
    value = difference(np.ones(12))
    levels = np.array([0.05, 0.95])
    if method == "bca":
        normal = NormalDist()
        bias = normal.inv_cdf(float(np.mean(drawn < value)))
        out = np.array([difference(1 - np.eye(12)[i]) for i in range(12)])
        pull = out.mean() - out
        acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
        z = [bias + normal.inv_cdf(float(level)) for level in levels]
        levels = np.array([normal.cdf(bias + a / (1 - acceleration * a)) for a in z])
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(drawn, levels)), abs=1e-12)
    assert interval.value == pytest.approx(value, abs=1e-12)
    assert interval.unreliable


def test_the_pair_cancels_what_the_videos_share() -> None:
    student, teacher = matched(3, 40), matched(103, 40)
    assert student.ground_truth is not teacher.ground_truth
    paired = map_difference_interval(student, teacher, 0.5, np.random.default_rng(0), replicates=400)
    alone = map_interval(student, 0.5, np.random.default_rng(0), replicates=400)
    assert paired.low < 0 < paired.high  # same noise: no difference
    assert paired.high - paired.low < 1.4 * (alone.high - alone.low)
    worse = matched(203, 40, noise=3.0)
    lost = map_difference_interval(worse, teacher, 0.5, np.random.default_rng(0), replicates=400)
    assert lost.high < 0
    same = map_difference_interval(student, student, "average", np.random.default_rng(0), replicates=50)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_class_that_is_not_drawn_leaves_both_arms() -> None:
    truth, found = tables(3, videos=6)
    rare = pa.table([["v0"], [50.0], [54.0], [3]], schema=GROUND_TRUTH_SCHEMA)
    truth = pa.concat_tables([truth, rare])
    matches = match_detections(prepare_ground_truth(truth, 5), found, TIOUS)  # class 4: never any
    interval = map_interval(matches, 0.5, np.random.default_rng(0), replicates=500)
    has = matches.ground_truth.counts > 0
    rng = np.random.default_rng(0)
    draws = np.concatenate([rng.integers(6, size=(rows, 6)) for rows in (128, 128, 128, 116)])
    missing = sum(not has[label, draw].any() for draw in draws for label in range(4))
    assert interval.dropped_classes == missing >= (draws != 0).all(axis=1).sum() > 0
    assert interval.value == pytest.approx(mean_average_precision(truth, found, TIOUS, 5).map[0.5])


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_a_class_is_as_if_it_were_alone(method: Any) -> None:
    truth, videos = tables(3, videos=9)[0], [f"v{index}" for index in range(9)]
    rare = pa.table([["v0"], [50.0], [54.0], [3]], schema=GROUND_TRUTH_SCHEMA)
    truth = pa.concat_tables([truth, rare])
    found = [tables(seed, videos=9, classes=4, noise=noise)[1] for seed, noise in ((3, 2.0), (103, 1.0))]

    def arms(label: int | None) -> list[Matches]:
        alone = [
            table if label is None else table.filter(pa.compute.equal(table["label"], label))
            for table in (truth, *found)
        ]
        prepared = prepare_ground_truth(alone[0], 5, videos)  # class 4: never any
        return [match_detections(prepared, table, TIOUS) for table in alone[1:]]

    def options() -> tuple[Any, ...]:
        return np.random.default_rng(2), 300, 0.9, method

    found_at = difference_intervals(*arms(None), (0.5, "average"), *options())
    for tiou, at in found_at.items():
        intervals = at.classes
        assert at.map == map_difference_interval(*arms(None), tiou, *options())
        assert list(intervals) == [0, 1, 2, 3]
        for label, interval in intervals.items():
            assert interval == map_difference_interval(*arms(label), tiou, *options())
        assert (intervals[0].dropped_classes, intervals[0].replicates) == (0, 300)
        assert 60 < intervals[3].dropped_classes < 160  # (8 / 9) ** 9 of 300 do not draw its only video


def test_nothing_is_known_of_a_class_that_is_never_drawn() -> None:
    truth, found = tables(3, videos=30)
    rare = pa.table([["v0"], [50.0], [54.0], [3]], schema=GROUND_TRUTH_SCHEMA)
    prepared = prepare_ground_truth(pa.concat_tables([truth, rare]), 4)
    matches = match_detections(prepared, found, TIOUS)
    seed = next(seed for seed in range(9) if 0 not in np.random.default_rng(seed).integers(30, size=30))
    interval = difference_intervals(matches, matches, (0.5,), np.random.default_rng(seed), 1)[0.5].classes[3]
    assert (interval.low, interval.high, interval.replicates, interval.dropped_classes) == (-1, 1, 0, 1)


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (-0.009, 0.02, 0.01, "holds"),
        (0.001, 0.02, 0.01, "holds"),
        (-0.01, 0.02, 0.01, "holds"),
        (-0.011, 0.02, 0.01, "undecided"),
        (-0.05, -0.01, 0.01, "undecided"),
        (-0.05, -0.011, 0.01, "inferior"),
        (0.0, 0.0, 0.0, "holds"),
        (-0.001, 0.0, 0.0, "undecided"),
    ],
)
def test_noninferiority(low: float, high: float, margin: float, verdict: str) -> None:
    assert noninferiority(low, high, margin) == verdict


def test_wrong_questions_are_refused() -> None:
    first, rng = matched(3, 8), np.random.default_rng(0)
    cases = [
        (lambda: map_interval(first, 0.4, rng), "tIoU 0.4 was not matched"),
        (lambda: map_interval(first, 0.5, rng, replicates=0), "replicates 0"),
        (lambda: map_interval(first, 0.5, rng, confidence=1.0), "confidence 1.0"),
        (lambda: map_difference_interval(first, matched(4, 8), 0.5, rng), "different ground truths"),
        (
            lambda: map_difference_interval(first, replace(first, tious=(0.3, 0.6)), 0.3, rng),
            "different tIoU",
        ),
        (lambda: difference_intervals(first, matched(4, 8), (0.5,), rng), "different ground truths"),
    ]
    for question, message in cases:
        with pytest.raises(MetricError, match=message):
            question()
