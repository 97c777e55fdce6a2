"""From a video to windows of the input grid, and between seconds and grid units (design, section 2).

Three units: video *frames*; input *steps*, one per sampled frame; *feature-grid* units, in which targets and
decoded boundaries stand. Frames map to seconds by frames / duration, as in the release, not by the written
fps: targets and decoded boundaries then agree whatever the file says its rate is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pbd_ray.config import GridConfig
from pbd_ray.data.annotations import Video

Draw = Callable[[int, int], int]
"""draw(low, high): a uniform integer, both ends included."""


@dataclass(frozen=True, eq=False)
class Window:
    """One input of the detector."""

    video: str
    frame_indices: npt.NDArray[np.int64]
    """(T,) frames of the file, T = grid.window_frames; the tail repeats the last valid frame."""
    valid_steps: int
    """Steps of the feature grid that hold video."""
    start_frame: int
    fps: float
    duration_seconds: float
    segments: npt.NDArray[np.float32]
    """(n, 2) targets in feature-grid units; empty at inference."""
    labels: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Truncation:
    """Part of a video's input steps: `first` .. `first + length`, targets counted from `first`."""

    first: int
    length: int
    segments: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]


def inference_windows(video: Video, grid: GridConfig) -> tuple[Window, ...]:
    """The windows that together see every input step of a video, in order of time, none twice.

    The last one ends with the video. (The release has the last one twice where the number of steps is a
    multiple of the hop, and at small overlaps leaves a tail unseen.)

    Raises:
        ValueError: the video's frame count is unknown.
    """
    if grid.kind == "resize":
        return (_resized(video, grid, *_no_targets()),)
    steps = _input_steps(video, grid)
    return tuple(
        _sliding(video, grid, Truncation(first, min(grid.window_frames, steps - first), *_no_targets()))
        for first in window_starts(steps, grid)
    )


def inference_window_count(video: Video, grid: GridConfig) -> int:
    """How many `inference_windows` a video has, without making them.

    Raises:
        ValueError: the video's frame count is unknown.
    """
    steps = _input_steps(video, grid)
    return 1 if grid.kind == "resize" else len(window_starts(steps, grid))


def training_window(
    video: Video, grid: GridConfig, rng: np.random.Generator, min_instance_fraction: float = 0.0
) -> Window:
    """One window with its targets; sliding grids draw where it lies, resize grids take the whole video.

    Args:
        min_instance_fraction: instances not longer than this share of the video are left out.

    Raises:
        ValueError: the video's frame count is unknown.
    """
    if grid.kind == "resize":
        fractions = np.clip(video.segments_seconds / video.duration_seconds, 0.0, 1.0)
        kept = _long_enough(video, min_instance_fraction) & (fractions[:, 1] > fractions[:, 0])
        segments = (fractions[kept] * grid.feature_steps).astype(np.float32)
        return _resized(video, grid, *_distinct(segments, video.labels[kept]))
    frames, labels = instance_frames(video, min_instance_fraction)
    segments = frames / np.float32(grid.stride_frames)

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high, endpoint=True))

    return _sliding(video, grid, truncate(_input_steps(video, grid), segments, labels, grid, draw))


def grid_frames(video: Video, grid: GridConfig) -> npt.NDArray[np.int64]:
    """Every frame that any window of the video, at training or inference, can ask for; ascending."""
    if grid.kind == "resize":
        return np.unique(_resized(video, grid, *_no_targets()).frame_indices)
    return np.arange(_input_steps(video, grid), dtype=np.int64) * grid.stride_frames


def seconds_to_grid(seconds: npt.ArrayLike, window: Window, grid: GridConfig) -> npt.NDArray[np.float64]:
    """Times of the video, of any shape, in the window's feature-grid units. Not clipped."""
    times = np.asarray(seconds, np.float64)
    if grid.kind == "resize":
        return np.asarray(times / window.duration_seconds * grid.feature_steps)
    steps = (times * window.fps - window.start_frame) / grid.stride_frames
    return np.asarray(steps * (grid.feature_steps / grid.window_frames))


def grid_to_seconds(steps: npt.ArrayLike, window: Window, grid: GridConfig) -> npt.NDArray[np.float64]:
    """Feature-grid positions of a window, of any shape, in seconds of the video. Not clipped to it."""
    positions = np.asarray(steps, np.float64)
    if grid.kind == "resize":
        return np.asarray(positions / grid.feature_steps * window.duration_seconds)
    inputs = positions * (grid.window_frames / grid.feature_steps)
    return np.asarray((inputs * grid.stride_frames + window.start_frame) / window.fps)


def window_starts(steps: int, grid: GridConfig) -> tuple[int, ...]:
    """First input step of every sliding window over `steps` input steps."""
    hop = max(1, int(grid.window_frames * (1 - grid.overlap)))
    last = max(0, steps - grid.window_frames)
    return (*range(0, last, hop), last)


def instance_frames(
    video: Video, min_instance_fraction: float = 0.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Instances as frames (n, 2), rounded down as the release does, and their labels (n,).

    What is shorter than a frame or stands twice is left out.
    """
    long = _long_enough(video, min_instance_fraction)
    # This order of operations: 48 s of 53.333 s and 1600 frames is frame 1439 in the release.
    frames = np.floor(video.segments_seconds[long] / video.duration_seconds * video.frames)
    frames = np.clip(frames, 0, video.frames).astype(np.float32)
    lasting = frames[:, 1] > frames[:, 0]
    return _distinct(frames[lasting], video.labels[long][lasting])


def truncate(
    steps: int,
    segments: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int32],
    grid: GridConfig,
    draw: Draw,
) -> Truncation:
    """Draw one window of a training video with `steps` input steps (ActionFormer's random truncation).

    It keeps, cut to the window, the instances of which at least `truncation_keep` lie inside, and is drawn
    again until it keeps one, at most `truncation_tries` times; after that it is a window without instances.
    A video no longer than the window is cropped to a share of itself, drawn from `crop_ratio`, instead.

    Args:
        segments: (n, 2) in input steps.
    """
    length = grid.window_frames
    if steps <= length:
        low, high = (round(share * steps) for share in grid.crop_ratio)
        length = draw(max(low, 1), min(high, steps))
        if length == steps:
            return _scaled(Truncation(0, steps, segments, labels), grid)
    for _ in range(grid.truncation_tries if len(segments) else 1):
        first = draw(0, steps - length)
        left = np.maximum(segments[:, 0], np.float32(first))
        right = np.minimum(segments[:, 1], np.float32(first + length))
        inside = np.clip(right - left, 0, None) / (segments[:, 1] - segments[:, 0])
        kept = inside >= grid.truncation_keep
        if kept.any():
            break
    moved = np.stack([left[kept], right[kept]], axis=1) - np.float32(first)
    return _scaled(Truncation(first, length, moved, labels[kept]), grid)


def _scaled(part: Truncation, grid: GridConfig) -> Truncation:
    """Targets in feature-grid units instead of input steps."""
    scale = np.float32(grid.feature_steps / grid.window_frames)
    return Truncation(part.first, part.length, part.segments * scale, part.labels)


def _sliding(video: Video, grid: GridConfig, part: Truncation) -> Window:
    frames = (part.first + np.arange(part.length, dtype=np.int64)) * grid.stride_frames
    return Window(
        video=video.id,
        frame_indices=np.pad(frames, (0, grid.window_frames - part.length), mode="edge"),
        valid_steps=-(-part.length * grid.feature_steps // grid.window_frames),
        start_frame=int(frames[0]),
        fps=video.frames / video.duration_seconds,
        duration_seconds=video.duration_seconds,
        segments=part.segments,
        labels=part.labels,
    )


def _resized(
    video: Video, grid: GridConfig, segments: npt.NDArray[np.float32], labels: npt.NDArray[np.int32]
) -> Window:
    bin_frames = _known_frames(video) / grid.window_frames
    # Stepping as the release's np.arange does, so that centres half-way between frames round as there.
    first = bin_frames / 2 - 0.5
    step = (first + bin_frames) - first
    centres = np.round(first + np.arange(grid.window_frames) * step)
    return Window(
        video=video.id,
        frame_indices=np.clip(centres, 0, video.frames - 1).astype(np.int64),
        valid_steps=grid.feature_steps,
        start_frame=0,
        fps=video.frames / video.duration_seconds,
        duration_seconds=video.duration_seconds,
        segments=segments,
        labels=labels,
    )


def _input_steps(video: Video, grid: GridConfig) -> int:
    return -(-_known_frames(video) // grid.stride_frames)


def _known_frames(video: Video) -> int:
    if video.frames < 1:
        raise ValueError(f"video {video.id!r}: frames is {video.frames}; probe its file first")
    return video.frames


def _long_enough(video: Video, min_instance_fraction: float) -> npt.NDArray[np.bool_]:
    lengths = np.diff(video.segments_seconds, axis=1)[:, 0]
    return np.asarray(lengths / video.duration_seconds > min_instance_fraction)


def _distinct(
    segments: npt.NDArray[np.float32], labels: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Instances without repeats, in the order of their first appearance (as OpenTAD)."""
    rows = np.column_stack([segments, labels])
    _, first = np.unique(rows, axis=0, return_index=True)
    first.sort()
    return segments[first], labels[first]


def _no_targets() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    return np.zeros((0, 2), np.float32), np.zeros(0, np.int32)
