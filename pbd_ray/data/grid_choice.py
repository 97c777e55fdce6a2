"""Which input grid suits a data set, from the lengths of its training videos and instances, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from pbd_ray.config import GridConfig
from pbd_ray.data.annotations import Annotations

SHORT_STEPS = 6
"""Feature steps that a short instance (5th percentile) spans: 6 in THUMOS14's published grid."""
CONTEXT = 8
"""A window holds so many long instances (95th percentile), as THUMOS14's published grid about does."""
MOST_STEPS = 768
"""Input steps of the published grids: what memory was planned for."""
RESIZE_SHARE, RESIZE_STEPS = 0.25, 192
"""Where the median instance covers so much of its video, a whole video is one input (ActivityNet: 0.33) of at
most so many feature steps."""
MULTIPLE = 32
"""Of a window: chunks of 16 frames, and a coarsest stride of at most 32."""
LEAST_LEVELS, MOST_LEVELS = 4, 6
BEYOND_STEPS = 10000


@dataclass(frozen=True)
class GridChoice:
    """A grid, a feature pyramid, and the reason for each."""

    grid: GridConfig
    regression_ranges: tuple[tuple[float, float], ...]
    """(low, high) of every level, feature steps."""
    reasons: Mapping[str, str]
    """Field of the grid, or `levels` -> a line for people."""


@dataclass(frozen=True)
class _Lengths:
    """Of training instances and videos; frames are of the video files."""

    short_frames: float
    """5th percentile of the instances, as `short_share`."""
    long_frames: float
    longest_frames: float
    video_frames: int
    """Of the longest video."""
    fps: float
    """Of the median video."""
    short_share: float
    """Of its video that an instance covers."""
    median_share: float
    longest_share: float


def choose_grid(training: Annotations, short_side_pixels: int, largest_pixels: int = 160) -> GridChoice:
    """The grid for these videos: sliding windows, or, where instances fill long videos, whole videos.

    A window holds the longest instance whole, if need be at the price of short ones' resolution.

    Args:
        training: with at least one instance. Test videos choose nothing, so they are not looked at.
        short_side_pixels: of the files.
        largest_pixels: a side of what the detector sees is not longer.
    """
    lengths = _lengths(training)
    stride = max(1, int(lengths.short_frames / SHORT_STEPS))
    wanted = min(max(CONTEXT * lengths.long_frames, lengths.longest_frames), lengths.video_frames)
    if lengths.median_share >= RESIZE_SHARE and wanted > stride * MOST_STEPS:
        choice = _resized(lengths)
    else:
        choice = _sliding(lengths, stride, wanted)
    crop = max(16, min(largest_pixels, short_side_pixels // 16 * 16))
    pixels = {
        "train_short_side_pixels": min(round(crop * 182 / 160), max(crop, short_side_pixels)),
        "test_short_side_pixels": crop,
        "crop_pixels": crop,
    }
    return replace(choice, grid=choice.grid.model_copy(update=pixels))


def _lengths(training: Annotations) -> _Lengths:
    videos = training.videos
    seconds = [np.diff(video.segments_seconds, axis=1)[:, 0] for video in videos]
    frames = np.concatenate([one * video.fps for one, video in zip(seconds, videos, strict=True)])
    shares = np.concatenate(
        [one / video.duration_seconds for one, video in zip(seconds, videos, strict=True)]
    )
    short, long, longest = np.percentile(frames, (5, 95, 100)).tolist()
    longest_video = max(video.frames for video in videos)
    fps = float(np.median([video.fps for video in videos]))
    return _Lengths(short, long, longest, longest_video, fps, *np.percentile(shares, (5, 50, 100)).tolist())


def _resized(lengths: _Lengths) -> GridChoice:
    steps = min(RESIZE_STEPS, _rounded(SHORT_STEPS / lengths.short_share))
    longest, short = lengths.longest_share * steps, lengths.short_share * steps
    reasons = {
        "kind": f"the median instance covers {lengths.median_share:.0%} of its video: a video is one input",
        "feature_steps": f"the longest instance spans {longest:.0f} of them, a short one (5 %) {short:.1f}",
    }
    grid = GridConfig(kind="resize", window_frames=4 * steps, feature_steps=steps)
    return _with_levels(grid, longest, reasons)


def _sliding(lengths: _Lengths, stride: int, wanted_frames: float) -> GridChoice:
    short, longest = lengths.short_frames, lengths.longest_frames
    why = "" if longest <= stride * MOST_STEPS else f"the longest instance must fit into {MOST_STEPS} steps; "
    stride = max(stride, math.ceil(longest / MOST_STEPS))
    window = min(MOST_STEPS, _rounded(wanted_frames / stride))
    spans = f"{window * stride / lengths.fps:.1f} s at {lengths.fps:g} frames a second"
    reasons = {
        "kind": "every video fits into one window"
        if lengths.video_frames <= window * stride
        else f"the median instance covers {lengths.median_share:.0%} of its video",
        "window_frames": f"{spans}; the longest instance ({longest / lengths.fps:.1f} s) spans "
        f"{longest / stride:.0f} steps",
        "stride_frames": f"{why}a short instance (5 %, {short:.0f} frames) spans {short / stride:.1f} steps",
    }
    grid = GridConfig(window_frames=window, stride_frames=stride, feature_steps=window)
    return _with_levels(grid, longest / stride, reasons)


def _with_levels(grid: GridConfig, longest_steps: float, reasons: dict[str, str]) -> GridChoice:
    """ActionFormer's ranges, doubling from 4 feature steps, to where the last level reaches from one end of
    the longest instance to the other within four of its strides."""
    levels = min(MOST_LEVELS, max(LEAST_LEVELS, math.ceil(math.log2(max(longest_steps, 1))) - 1))
    bounds = (0, *(2.0 ** (level + 2) for level in range(levels - 1)), BEYOND_STEPS)
    reasons["levels"] = f"the coarsest has a stride of {2 ** (levels - 1)} steps"
    return GridChoice(grid, tuple(pairwise(bounds)), reasons)


def _rounded(steps: float) -> int:
    return math.ceil(steps / MULTIPLE) * MULTIPLE
