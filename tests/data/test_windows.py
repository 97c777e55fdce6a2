from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbd_ray.config import GridConfig
from pbd_ray.data.annotations import Video
from pbd_ray.data.windows import (
    grid_to_seconds,
    inference_window_count,
    inference_windows,
    instance_frames,
    seconds_to_grid,
    training_window,
    truncate,
    window_starts,
)

SMALL = GridConfig(window_frames=16, stride_frames=2, feature_steps=16)
RESIZE = GridConfig(kind="resize", window_frames=32, feature_steps=8)


def make_video(
    frames: int, fps: float = 30.0, segments: Any = (), labels: Any = (), duration: float | None = None
) -> Video:
    return Video(
        id="v",
        path="v.mp4",
        subset="training",
        duration_seconds=duration or frames / fps,
        fps=fps,
        frames=frames,
        segments_seconds=np.array(segments, np.float64).reshape(-1, 2),
        labels=np.array(labels, np.int32),
    )


@pytest.fixture(scope="module")
def golden(reference_file: Callable[[str], Path]) -> dict[str, Any]:
    with gzip.open(reference_file("windows.json.gz"), "rt") as file:
        return json.load(file)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def golden_videos(golden: dict[str, Any]) -> dict[str, Video]:
    return {
        name: make_video(
            entry["frame"],
            segments=[item["segment"] for item in entry["annotations"]],
            labels=[int(item["label"][1:]) for item in entry["annotations"]],
            duration=entry["duration"],
        )
        for name, entry in golden["videos"].items()
    }


@pytest.mark.golden
def test_inference_windows_are_the_release_s_without_its_repeats(
    golden: dict[str, Any], golden_videos: dict[str, Video]
) -> None:
    for name, video in golden_videos.items():
        theirs = [row for row in golden["overlap_0.5_test"] if row["video"] == name]
        starts = [row["window_start_frame"] for row in theirs]
        assert (len(set(starts)) < len(starts)) == (name in golden["videos_with_duplicated_window"])
        distinct = [
            row for index, row in enumerate(theirs) if row["window_start_frame"] not in starts[:index]
        ]
        ours = inference_windows(video, GridConfig())
        keys = ("window_start_frame", "valid", "first_frame", "last_frame", "n_frames")
        assert [
            (w.start_frame, w.valid_steps, w.frame_indices[0], w.frame_indices[-1], len(w.frame_indices))
            for w in ours
        ] == [tuple(row[key] for key in keys) for row in distinct]
        assert all(not len(window.segments) and not len(window.labels) for window in ours)


@pytest.mark.golden
def test_instance_frames_are_the_release_s(golden: dict[str, Any], golden_videos: dict[str, Video]) -> None:
    """Its windows at overlap .25, cut to window and completeness here and not by our code."""
    threshold = golden["params"]["ioa_thresh"]
    seen = 0
    for row in golden["overlap_0.25_with_gt"]:
        frames, labels = instance_frames(golden_videos[row["video"]])
        first, last = row["window_start_frame"], row["window_end_frame"]
        cut = np.clip(frames, first, last)
        kept = np.diff(cut)[:, 0] / np.diff(frames)[:, 0] > threshold
        assert cut[kept].tolist() == row["gt_segments_frames"]
        assert labels[kept].tolist() == row["gt_labels"]
        assert ((cut[kept] - first) / 4).tolist() == row["gt_segments_snippets"]
        seen += len(row["gt_labels"])
    assert seen > 20


@pytest.mark.golden
def test_overlap_of_a_quarter_keeps_the_release_s_windows_and_adds_the_tails(
    golden: dict[str, Any], golden_videos: dict[str, Video]
) -> None:
    grid = GridConfig(overlap=0.25)
    added = 0
    for name, video in golden_videos.items():
        rows = [row for row in golden["overlap_0.25_with_gt"] if row["video"] == name]
        ours = [(w.start_frame, w.valid_steps) for w in inference_windows(video, grid)]
        assert {(row["window_start_frame"], row["valid"]) for row in rows} <= set(ours)
        added += len(ours) - len(rows)
    assert added > 0


@pytest.mark.golden
@pytest.mark.parametrize("case", range(24))
def test_random_truncation_is_the_release_s(golden: dict[str, Any], case: int) -> None:
    """With python's generator put in place of ours, number for number."""
    row = golden["random_trunc"][case]
    steps = -(-row["total_frames"] // 4)
    part = truncate(
        steps,
        np.array(row["gt_in"], np.float32),
        np.array(row["labels_in"], np.int32),
        GridConfig(),
        random.Random(row["python_random_seed"]).randint,
    )
    assert part.segments.dtype == np.float32
    assert part.segments.tolist() == row["gt_out"]
    assert part.labels.tolist() == row["labels_out"]
    assert (part.first * 4, (part.first + part.length - 1) * 4) == (row["first_frame"], row["last_frame"])
    assert part.length == row["valid"]


def test_training_window_leaves_the_annotations_alone_and_repeats_itself() -> None:
    video = make_video(4000, segments=[[10, 20], [60, 90]], labels=[3, 1])
    before = video.segments_seconds.copy()
    video.segments_seconds.flags.writeable = False
    windows = [training_window(video, GridConfig(), np.random.default_rng(7)) for _ in range(3)]
    assert np.array_equal(video.segments_seconds, before)
    for window in windows[1:]:
        assert np.array_equal(window.frame_indices, windows[0].frame_indices)
        assert np.array_equal(window.segments, windows[0].segments)
    others = {training_window(video, GridConfig(), np.random.default_rng(k)).start_frame for k in range(20)}
    assert len(others) > 5


def test_training_targets_name_the_annotated_seconds() -> None:
    video = make_video(4000, segments=[[60, 64]], labels=[1])
    for grid in (GridConfig(), GridConfig(feature_steps=192)):
        for seed in range(20):
            window = training_window(video, grid, np.random.default_rng(seed))
            found = grid_to_seconds(window.segments, window, grid)
            assert len(found) == 1
            # At least 3/4 of it is inside, where it was annotated, rounded down to a frame.
            assert found[0, 0] >= 60 - 1 / 30 - 1e-6 and found[0, 1] <= 64 + 1e-6
            assert found[0, 1] - found[0, 0] >= 3 - 1e-6
            assert window.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("frames", "segments", "valid"),
    [
        pytest.param(3000, [], 16, id="no instances"),
        pytest.param(3000, [[1.0, 1.001]], 16, id="shorter than a frame"),
        pytest.param(3000, [[10, 90]], 16, id="never inside by three quarters"),
        pytest.param(1, [], 1, id="one frame"),
    ],
)
def test_training_windows_without_targets(frames: int, segments: Any, valid: int) -> None:
    video = make_video(frames, segments=segments, labels=[0] * len(segments))
    window = training_window(video, SMALL, np.random.default_rng(0))
    assert window.segments.shape == (0, 2) and window.labels.shape == (0,)
    assert window.valid_steps == valid
    assert len(window.frame_indices) == 16 and window.frame_indices.max() < frames


def test_a_short_video_is_cropped_within_the_ratio() -> None:
    grid = GridConfig(window_frames=768, crop_ratio=(0.5, 0.75))
    video = make_video(400, segments=[[0, 400 / 30]], labels=[0])
    lengths = {training_window(video, grid, np.random.default_rng(seed)).valid_steps for seed in range(200)}
    assert min(lengths) >= 50 and max(lengths) <= 75 and len(lengths) > 15
    whole = training_window(video, GridConfig(crop_ratio=(1.0, 1.0)), np.random.default_rng(0))
    assert (whole.start_frame, whole.valid_steps, whole.segments.tolist()) == (0, 100, [[0.0, 100.0]])


@pytest.mark.parametrize("grid", [SMALL, RESIZE], ids=["sliding", "resize"])
def test_repeats_go_and_two_labels_of_one_segment_stay(grid: GridConfig) -> None:
    video = make_video(30, segments=[[0.5, 0.9], [0.1, 0.3], [0.5, 0.9], [0.5, 0.9]], labels=[2, 0, 2, 1])
    grid = grid.model_copy(update={"crop_ratio": (1.0, 1.0)})
    window = training_window(video, grid, np.random.default_rng(0))
    assert window.labels.tolist() == [2, 0, 1]
    assert window.segments[0].tolist() == window.segments[2].tolist()


def test_instances_outside_the_video_are_no_targets() -> None:
    video = make_video(30, segments=[[2.0, 3.0], [0.5, 4.0]], labels=[0, 1])
    for grid in (SMALL, RESIZE):
        grid = grid.model_copy(update={"crop_ratio": (1.0, 1.0)})
        window = training_window(video, grid, np.random.default_rng(0))
        assert window.labels.tolist() == [1]
        assert grid_to_seconds(window.segments, window, grid)[0].tolist() == pytest.approx([0.5, 1.0])


def test_min_instance_fraction_is_exclusive() -> None:
    video = make_video(3000, segments=[[0, 1], [5, 6.5], [10, 30]], labels=[0, 1, 2])  # 100 seconds
    for fraction, expected in [(0.0, [0, 1, 2]), (0.01, [1, 2]), (0.2, []), (0.1, [2])]:
        window = training_window(video, RESIZE, np.random.default_rng(0), min_instance_fraction=fraction)
        assert window.labels.tolist() == expected


def test_resize_takes_bin_centres_and_scales_targets() -> None:
    video = make_video(320, fps=10.0, segments=[[8, 16]], labels=[0])
    window = training_window(video, RESIZE, np.random.default_rng(0))
    # 32 bins of 10 frames; the centre of frames 0..9 is 4.5, which rounds to the even 4
    expected = [round(10 * k + 4.5) for k in range(32)]
    assert window.frame_indices.tolist() == expected
    assert window.segments.tolist() == [[2.0, 4.0]]
    assert window.valid_steps == 8 and window.start_frame == 0
    (seen,) = inference_windows(video, RESIZE)
    assert seen.frame_indices.tolist() == expected and seen.segments.shape == (0, 2)


def test_resize_repeats_frames_of_a_short_video() -> None:
    (window,) = inference_windows(make_video(3), RESIZE)
    indices = window.frame_indices
    assert set(indices.tolist()) == {0, 1, 2} and (np.diff(indices) >= 0).all() and len(indices) == 32


@pytest.mark.parametrize(
    ("feature_steps", "frames", "valid"), [(16, 9, 5), (8, 9, 3), (8, 8, 2), (32, 9, 10), (8, 32, 8)]
)
def test_valid_steps_cover_the_valid_frames(feature_steps: int, frames: int, valid: int) -> None:
    grid = GridConfig(window_frames=16, stride_frames=2, feature_steps=feature_steps)
    (window,) = inference_windows(make_video(frames), grid)
    assert window.valid_steps == valid


@pytest.mark.parametrize("grid", [SMALL, RESIZE, GridConfig(overlap=0.0)], ids=["sliding", "resize", "apart"])
@pytest.mark.parametrize("frames", [1, 3071, 3072, 3073, 4608, 4609, 9217])
def test_windows_are_counted_without_making_them(grid: GridConfig, frames: int) -> None:
    video = make_video(frames)
    assert inference_window_count(video, grid) == len(inference_windows(video, grid))


@pytest.mark.parametrize("grid", [SMALL, RESIZE], ids=["sliding", "resize"])
def test_unknown_frame_count_is_refused(grid: GridConfig) -> None:
    video = make_video(0, duration=3.0)
    for of_video in (inference_windows, inference_window_count):
        with pytest.raises(ValueError, match="probe its file first"):
            of_video(video, grid)
    with pytest.raises(ValueError, match="probe its file first"):
        training_window(video, grid, np.random.default_rng(0))


def test_the_design_s_formula() -> None:
    """seconds = (x * 4 + window start frame) / fps; on a coarser feature grid x counts input steps."""
    window = inference_windows(make_video(9000), GridConfig())[1]
    assert window.start_frame == 1536
    assert grid_to_seconds([0, 10, 768], window, GridConfig()).tolist() == pytest.approx(
        [1536 / 30, 1576 / 30, 4608 / 30]
    )
    coarse = GridConfig(feature_steps=192)
    assert grid_to_seconds(10, window, coarse) == pytest.approx((40 * 4 + 1536) / 30)
    assert seconds_to_grid(1576 / 30, window, coarse) == pytest.approx(2.5)
    resized = inference_windows(make_video(9000), RESIZE)[0]
    assert grid_to_seconds([[0, 2], [4, 8]], resized, RESIZE).tolist() == [[0, 75], [150, 300]]


@st.composite
def grids(draw: st.DrawFn) -> GridConfig:
    return GridConfig(
        kind=draw(st.sampled_from(["sliding", "resize"])),
        window_frames=draw(st.integers(1, 64)),
        stride_frames=draw(st.integers(1, 8)),
        overlap=draw(st.floats(0, 0.99)),
        feature_steps=draw(st.integers(1, 64)),
    )


@given(grid=grids(), frames=st.integers(1, 3000), fps=st.floats(1, 120), data=st.data())
def test_seconds_and_grid_round_trip(grid: GridConfig, frames: int, fps: float, data: st.DataObject) -> None:
    video = make_video(frames, fps)
    window = data.draw(st.sampled_from(inference_windows(video, grid)))
    seconds = data.draw(st.lists(st.floats(0, video.duration_seconds), max_size=4))
    there = seconds_to_grid(seconds, window, grid)
    back = grid_to_seconds(there, window, grid)
    np.testing.assert_allclose(back, seconds, rtol=1e-9, atol=1e-9 * (1 + video.duration_seconds))
    assert (np.diff(seconds_to_grid(sorted(seconds), window, grid)) >= 0).all()


@given(
    steps=st.integers(1, 4000),
    window=st.integers(1, 300),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 0.99]),
)
def test_starts_cover_every_step_once_in_order(steps: int, window: int, overlap: float) -> None:
    grid = GridConfig(window_frames=window, overlap=overlap)
    starts = window_starts(steps, grid)
    assert list(starts) == sorted(set(starts)) and starts[0] == 0
    covered = np.zeros(steps, bool)
    for start in starts:
        covered[start : start + window] = True
    assert covered.all()
    assert starts[-1] == max(0, steps - window)


@given(
    frames=st.integers(1, 500),
    grid=grids().filter(lambda grid: grid.kind == "sliding"),
    segments=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=5),
    seed=st.integers(0, 2**32),
)
def test_training_windows_are_sound(
    frames: int, grid: GridConfig, segments: list[tuple[float, float]], seed: int
) -> None:
    pairs = [sorted(pair) for pair in segments]
    video = make_video(frames, segments=pairs, labels=range(len(pairs)), duration=1)
    window = training_window(video, grid, np.random.default_rng(seed))
    assert len(window.frame_indices) == grid.window_frames
    assert window.frame_indices.min() >= 0 and window.frame_indices.max() < frames
    assert 1 <= window.valid_steps <= grid.feature_steps
    assert len(window.segments) == len(window.labels)
    assert (window.segments[:, 1] > window.segments[:, 0]).all()
    assert (window.segments >= 0).all()
    assert (window.segments <= grid.feature_steps * (1 + 1e-6)).all()
