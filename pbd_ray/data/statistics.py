"""What a data set is like: how many, how long, how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pbd_ray.data.annotations import Annotations

LOG_RATIO = 20
"""Where the largest value is so many times the smallest, a log scale shows both."""
_BINS = 20


@dataclass(frozen=True)
class Distribution:
    """Positive numbers: their quantiles, and how many lie in each bin."""

    count: int
    smallest: float
    fifth: float
    """5 % are smaller; 0 to 100 % by linear interpolation."""
    median: float
    ninety_fifth: float
    largest: float
    edges: tuple[float, ...]
    """Of the bins, ascending; a bin holds its left edge, the last one both."""
    counts: tuple[int, ...]
    """One fewer."""

    @property
    def on_log_scale(self) -> bool:
        """Whether the values want a log scale."""
        return self.largest > LOG_RATIO * self.smallest


@dataclass(frozen=True)
class Part:
    """One subset."""

    videos: int
    instances: int
    hours: float
    action_share: float
    """Of the time, how much lies in any instance."""


@dataclass(frozen=True)
class Statistics:
    """Of all videos together, where nothing else is said."""

    parts: Mapping[str, Part]
    instances: Mapping[str, Mapping[str, int]]
    """Class -> subset -> instances."""
    video_seconds: Distribution
    instance_seconds: Distribution
    instances_per_video: Distribution
    """Of videos that have any."""
    instance_share: Distribution
    """Of its video that an instance covers."""


def statistics_of(annotations: Annotations) -> Statistics:
    """Count and measure.

    Args:
        annotations: of at least one instance.
    """
    names = sorted({video.subset for video in annotations.videos})
    parts, instances = {}, {label: dict.fromkeys(names, 0) for label in annotations.classes}
    for name in names:
        videos = annotations.subset(name).videos
        total = sum(video.duration_seconds for video in videos)
        acted = sum(covered_seconds(video.segments_seconds) for video in videos)
        count = sum(len(video.labels) for video in videos)
        parts[name] = Part(len(videos), count, total / 3600, acted / total)
        for label in (label for video in videos for label in video.labels.tolist()):
            instances[annotations.classes[label]][name] += 1
    lengths = [np.diff(video.segments_seconds, axis=1)[:, 0] for video in annotations.videos]
    durations = [video.duration_seconds for video in annotations.videos]
    shares = [length / duration for length, duration in zip(lengths, durations, strict=True)]
    seconds = np.concatenate(lengths)
    numbers = np.array([len(length) for length in lengths if len(length)], np.float64)
    return Statistics(
        parts,
        instances,
        _distribution(np.array(durations), _edges(np.array(durations))),
        _distribution(seconds, _edges(seconds)),
        _distribution(numbers, _whole_edges(numbers)),
        _distribution(np.concatenate(shares), np.linspace(0, 1, _BINS + 1)),
    )


def covered_seconds(segments: npt.NDArray[np.float64]) -> float:
    """Length of the union of (n, 2) segments."""
    covered, reached = 0.0, -np.inf
    for start, end in segments[np.argsort(segments[:, 0])].tolist():
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _distribution(values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> Distribution:
    counts, _ = np.histogram(values, edges)
    low, fifth, median, ninety_fifth, high = np.percentile(values, (0, 5, 50, 95, 100)).tolist()
    bins = tuple(edges.tolist()), tuple(counts.tolist())
    return Distribution(len(values), low, fifth, median, ninety_fifth, high, *bins)


def _edges(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """From the smallest value to the largest; equally far apart on a log scale where `on_log_scale`."""
    low, high = float(values.min()), float(values.max())
    if high <= LOG_RATIO * low:
        return np.linspace(low, high if high > low else low * 1.1, _BINS + 1)
    edges = np.geomspace(low, high, _BINS + 1)
    edges[[0, -1]] = low, high  # exact, else the last value may lie beyond
    return edges


def _whole_edges(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Around whole numbers from 1, as many in a bin as keep the bins few."""
    most = int(values.max())
    step = -(-most // _BINS)
    return np.arange(0.5, most + step + 0.5, step)
