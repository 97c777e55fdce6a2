"""Counts and lengths against plain Python."""

from __future__ import annotations

import statistics as plain
from collections import Counter

import numpy as np
import pytest

from pbd_ray.data.annotations import Annotations, Video
from pbd_ray.data.statistics import Distribution, covered_seconds, statistics_of


def annotations(seed: int, videos: int = 40, scale: float = 1.0) -> Annotations:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(videos):
        duration, count = 10 + 20 * rng.random(), int(rng.integers(0, 5)) if number else 4
        starts = rng.random(count) * (duration - 5)
        segments = np.stack([starts, starts + rng.random(count) ** scale * 5 + 1e-3], axis=1)
        subset, labels = ("training", "validation")[number % 2], rng.integers(3, size=count).astype(np.int32)
        frames = round(duration * 30)
        made.append(Video(str(number), f"{number}.mp4", subset, duration, 30.0, frames, segments, labels))
    return Annotations(("a", "b", "c"), tuple(made))


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_against_plain_counting(scale: float) -> None:
    given = annotations(0, scale=scale)
    found = statistics_of(given)
    rows = given.ground_truth().to_pylist()
    subset = {video.id: video.subset for video in given.videos}
    counted = Counter((given.classes[row["label"]], subset[row["video"]]) for row in rows)
    assert {(label, name): n for label, of in found.instances.items() for name, n in of.items()} == counted
    for name, part in found.parts.items():
        videos = [video for video in given.videos if video.subset == name]
        assert (part.videos, part.instances) == (20, sum(subset[row["video"]] == name for row in rows))
        assert part.hours * 3600 == pytest.approx(sum(video.duration_seconds for video in videos))
    lengths = [row["end"] - row["start"] for row in rows]
    duration = {video.id: video.duration_seconds for video in given.videos}
    for one, values in (
        (found.instance_seconds, lengths),
        (found.video_seconds, list(duration.values())),
        (found.instances_per_video, list(Counter(row["video"] for row in rows).values())),
        (found.instance_share, [(row["end"] - row["start"]) / duration[row["video"]] for row in rows]),
    ):
        check(one, [float(value) for value in values])
    assert found.instance_seconds.on_log_scale and not found.video_seconds.on_log_scale


def check(one: Distribution, values: list[float]) -> None:
    assert one.count == len(values) == sum(one.counts)
    assert (one.smallest, one.largest) == pytest.approx((min(values), max(values)))
    twentieths = plain.quantiles(values, n=20, method="inclusive")
    assert (one.fifth, one.ninety_fifth) == pytest.approx((twentieths[0], twentieths[-1]))
    assert one.median == pytest.approx(plain.median(values))
    last = len(one.counts) - 1
    for index, (low, high, count) in enumerate(zip(one.edges, one.edges[1:], one.counts, strict=False)):
        assert count == sum(low <= value < high or (index == last and value == high) for value in values)


def test_many_instances_in_a_video_share_bins() -> None:
    """97 in one video: bins of five whole numbers each."""
    (first, *rest) = annotations(1, 3).videos
    segments = np.stack([np.arange(97) / 10, np.arange(97) / 10 + 0.1], axis=1)
    crowded = Video(*(first.id, first.path, first.subset, 10.0, 30.0, 300), segments, np.zeros(97, np.int32))
    found = statistics_of(Annotations(("a", "b", "c"), (crowded, *rest))).instances_per_video
    assert found.edges[:2] == (0.5, 5.5) and found.edges[-1] > 97 and found.counts[-1] == 1
    assert len(found.counts) <= 20


def test_one_length_only() -> None:
    (first, *_) = annotations(2, 1).videos
    segments = np.array([[0.0, 2.0], [3.0, 5.0]])
    only = Video(*(first.id, first.path, "training", 10.0, 30.0, 300), segments, np.zeros(2, np.int32))
    found = statistics_of(Annotations(("a",), (only,)))
    assert found.instance_seconds.counts[0] == 2 and found.parts["training"].action_share == pytest.approx(
        0.4
    )


@pytest.mark.parametrize("seed", range(3))
def test_covered_time(seed: int) -> None:
    """Of segments on a grid: the cells that any of them covers."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 60, size=(9, 2)), axis=1).astype(np.float64)
    cells = {cell for start, end in segments.astype(int).tolist() for cell in range(start, end)}
    assert covered_seconds(segments) == pytest.approx(len(cells))
