"""What is drawn of a video's detections, and where."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.data.annotations import DETECTION_SCHEMA
from pbd_ray.report.timeline import (
    MOST_LANES,
    MOST_ROWS,
    clock,
    draw_timeline,
    strip_info,
    tick_seconds,
    timeline_info,
)

Row = tuple[float, float, int, float]


def table(rows: Sequence[Row]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * 4
    return pa.table([["v"] * len(rows), *map(list, columns)], schema=DETECTION_SCHEMA)


@pytest.mark.parametrize(
    ("min_score", "scores"),
    [
        (None, [0.8, 0.5, 0.2]),  # at least a quarter of the best
        (0.0, [0.8, 0.5, 0.2, 0.1]),
        (0.5, [0.8, 0.5]),
        (1.0, []),
    ],
)
def test_which_are_drawn(min_score: float | None, scores: list[float]) -> None:
    found = table([(0, 9, 0, 0.5), (20, 29, 1, 0.1), (40, 49, 1, 0.8), (60, 69, 0, 0.2)])
    info = timeline_info([found], ("walk", "run"), 100.0, min_score)
    drawn = sorted((bar.score for lane in info.lanes for bar in lane.models[0]), reverse=True)
    assert drawn == scores
    assert (info.drawn, info.found) == (len(scores), 4)
    assert [lane.label for lane in info.lanes] == ["run", "walk"][: len(info.lanes)]


def test_at_most_twenty_of_every_model_by_default() -> None:
    many = table([(10.0 * k, 10.0 * k + 5, 0, 0.9 - k / 1000) for k in range(60)])
    few = table([(0, 5, 0, 0.01)])  # another model's scores are another scale
    info = timeline_info([many, few], ("walk",), 600.0)
    (lane,) = info.lanes
    assert [bar.start_seconds for bar in lane.models[0]] == [10.0 * k for k in range(20)]
    assert len(lane.models[1]) == 1
    assert (info.drawn, info.found) == (21, 61)


def test_bars_and_their_scores_do_not_touch() -> None:
    rng = np.random.default_rng(0)
    starts, lengths = rng.uniform(0, 90, 200), rng.uniform(0, 10, 200)
    rows = [(start, start + length, 0, score) for start, length, score in zip(
        starts.tolist(), lengths.tolist(), rng.uniform(0, 1, 200).tolist(), strict=True)]  # fmt: skip
    (lane,) = timeline_info([table(rows)], ("walk",), 95.0, 0.0).lanes
    (bars,) = lane.models
    assert lane.rows == (MOST_ROWS,) and 40 < len(bars) < 200
    assert bars[0].score == max(row[3] for row in rows) and bars[0].row == 0
    label = 0.28 / 11.0 * 95.0
    for row in range(MOST_ROWS):
        spans = sorted(
            (min(bar.start_seconds, bar.label_seconds), max(bar.end_seconds, bar.label_seconds + label))
            for bar in bars
            if bar.row == row
        )
        assert all(stop <= begin for (_, stop), (begin, _) in pairwise(spans))
        assert spans[0][0] >= 0 and spans[-1][1] <= 95.0 + 1e-9


def test_bars_end_with_the_video() -> None:
    (lane,) = timeline_info([table([(-1.0, 3.0, 0, 0.9), (8.0, 12.0, 0, 0.8)])], ("walk",), 10.0).lanes
    assert [(bar.start_seconds, bar.end_seconds, bar.row) for bar in lane.models[0]] == [
        (0, 3, 0),
        (8, 10, 0),
    ]


def test_the_best_classes_have_lanes() -> None:
    rows = [(0.0, 5.0, label, 0.5 + label / 1000) for label in range(MOST_LANES + 5)]
    info = timeline_info([table(rows)], [f"c{label}" for label in range(len(rows))], 10.0, 0.0)
    assert [lane.label for lane in info.lanes] == [f"c{label}" for label in range(len(rows) - 1, 4, -1)]
    assert (info.drawn, info.found) == (MOST_LANES, len(rows))


@pytest.mark.parametrize(
    ("frames", "size", "count"),
    [
        (1000, (320, 240), 8),  # 11 inches, each 4/3 wide
        (1000, (240, 320), 14),
        (1000, (100, 400), 16),
        (3, (240, 320), 3),
        (1, (320, 240), 1),
        (1000, (4000, 100), 1),  # wider than the axis: lower than others
    ],
)
def test_frames_keep_their_proportions(frames: int, size: tuple[int, int], count: int) -> None:
    fps, (width, height) = 10.0, size
    strip = strip_info(frames, fps, width, height)
    assert len(strip.indices) == count == len(set(strip.indices.tolist()))
    assert strip.indices[0] >= 0 and strip.indices[-1] < frames
    drawn_width_inches = strip.width_seconds / (frames / fps) * 11.0
    assert drawn_width_inches / strip.height_inches == pytest.approx(width / height)
    assert np.diff(strip.centers_seconds, append=np.inf).min() >= strip.width_seconds * (1 - 1e-9)
    # The centre of its part of the video, to a frame.
    np.testing.assert_allclose(strip.indices / fps, strip.centers_seconds, atol=1 / fps)


@pytest.mark.parametrize("seconds", [0.04, 0.5, 1.0, 3.9, 4.0, 59.0, 60.0, 3600.0, 10800.0, 86400.0, 1e6])
def test_ticks(seconds: float) -> None:
    ticks = tick_seconds(seconds)
    assert ticks[0] == 0 and ticks[-1] <= seconds + 1e-9 and 3 <= len(ticks) <= 14
    step = ticks[1]
    assert len({clock(tick, step) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("seconds", "step", "expected"),
    [(0, 0.5, "0 s"), (0.04, 0.04, "0.04 s"), (65.0, 5.0, "1:05"), (59.7, 9, "1:00"), (3600, 60, "1:00:00")],
)  # fmt: skip
def test_clock(seconds: float, step: float, expected: str) -> None:
    assert clock(seconds, step) == expected


@pytest.mark.parametrize(
    ("rows", "duration"), [([], 0.04), ([(0.0, 2.0, 0, 0.9), (1.0, 2.0, 1, 0.5)], 3.0)], ids=["none", "two"]
)
def test_the_picture(rows: list[Row], duration: float) -> None:
    """Any name is text; the frame is where its time is, in its own colour."""
    info = timeline_info([table(rows), table(rows)], ("$x_{$", "走る" * 20), duration)
    strip = strip_info(1, 1 / duration, 64, 48)
    frames = np.zeros((1, 48, 64, 3), np.uint8)
    frames[..., 0] = 200
    png = draw_timeline(info, strip, frames, "$\\frac{ <b>", ["one", "two"])
    pixels = matplotlib.image.imread(io.BytesIO(png))
    red = (np.abs(pixels[..., :3] - np.array([200 / 255, 0, 0])) < 0.02).all(2)
    down, across = np.nonzero(red)
    assert np.ptp(across) / np.ptp(down) == pytest.approx(64 / 48, rel=0.05)
    middle = (200 + 1100 / 2) / 1330  # of the axes, whose left edge is at 200 pixels
    assert across.mean() / pixels.shape[1] == pytest.approx(middle, abs=0.005)
