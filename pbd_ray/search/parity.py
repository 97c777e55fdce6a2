"""Does an export compute what its bundle does? Differences on videos, or on frames made for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pbd_ray.config import DetectorConfig, GridConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations
from pbd_ray.data.source import VideoSource, inference_batches
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.export.format import Forward, Tolerance
from pbd_ray.detector.postprocess import WindowProposals, decode, detections_of_proposals
from pbd_ray.metrics.mean_ap import mean_average_precision

_SEED = 0
_WINDOWS = 2


@dataclass(frozen=True)
class Difference:
    """Of the outputs for some windows: the largest, absolute."""

    windows: int
    logits: float
    offsets: float


@dataclass(frozen=True)
class DetectionParity:
    """Detections of the export beside the bundle's on the same videos.

    A detection's partner is the nearest one of its video and class, each taken once.
    """

    videos: int
    bundle: int
    """Detections."""
    export: int
    segments_seconds: float
    """Largest difference of a start or an end to its partner's."""
    scores: float
    bundle_map: dict[float, float]
    export_map: dict[float, float]

    @property
    def map_difference(self) -> float:
        return max(abs(value - self.export_map[tiou]) for tiou, value in self.bundle_map.items())


@dataclass(frozen=True)
class Parity:
    """Largest absolute differences of an export from its bundle, at the points that lie in the video."""

    inputs: str
    """What both were given, for people."""
    windows: int
    logits: float
    offsets: float
    """In strides of the point's level."""
    detections: DetectionParity | None = None
    """None where there are no annotated videos to look at."""

    def excess(self, tolerance: Tolerance) -> str | None:
        """The first difference that is over its tolerance, for people; None: all are within."""
        found = {"logits": (self.logits, tolerance.logits), "offsets": (self.offsets, tolerance.offsets)}
        if self.detections is not None:
            found["mAP"] = (self.detections.map_difference, tolerance.map)
        for name, (difference, limit) in found.items():
            if not difference <= limit:  # NaN is over, too
                return f"{name} differ by up to {difference:.3g} from the bundle's, over {limit:.3g}"
        return None


@torch.inference_mode()
def compare_on_videos(
    ours: Forward,
    exports: Sequence[Forward],
    config: DetectorConfig,
    videos: Annotations,
    source: VideoSource,
    window_batch: int,
    tious: Sequence[float],
) -> tuple[Parity, ...]:
    """A bundle and each of its exports on annotated videos; every window is decoded once for all.

    Args:
        config: the bundle's.

    Raises:
        UserError: a video cannot be read.
    """
    sides = (ours, *exports)
    differences: list[list[Difference]] = [[] for _ in exports]
    tables = [[DETECTION_SCHEMA.empty_table()] for _ in sides]
    for video in videos.videos:
        proposals: list[list[WindowProposals]] = [[] for _ in sides]
        for batch in inference_batches(source, video, config.grid, window_batch):
            outputs = [forward(batch.frames, batch.mask) for forward in sides]
            for found, output in zip(differences, outputs[1:], strict=True):
                found.append(_difference(outputs[0], output))
            for pooled, output in zip(proposals, outputs, strict=True):
                pooled.extend(decode(output, batch.windows, config.postprocess))
        for table, pooled in zip(tables, proposals, strict=True):
            table.append(detections_of_proposals(pooled, config.grid, config.postprocess))
    detections = [pa.concat_tables(table) for table in tables]
    truth = scored_against(videos)
    ids = [video.id for video in truth.videos]
    instances, count = truth.ground_truth(), len(truth.classes)
    maps = [
        mean_average_precision(instances, named(videos, table), tious, count, ids).map for table in detections
    ]
    parities = []
    for found, table, export_map in zip(differences, detections[1:], maps[1:], strict=True):
        rows = (detections[0].num_rows, table.num_rows)
        apart = partner_differences(detections[0], table)
        beside = DetectionParity(len(ids), *rows, *apart, maps[0], export_map)
        parities.append(_parity("selection videos", found, beside))
    return tuple(parities)


@torch.inference_mode()
def compare_on_random_pixels(
    ours: Forward, exports: Sequence[Forward], grid: GridConfig
) -> tuple[Parity, ...]:
    """A bundle and each of its exports on windows of random pixels, the last one half empty: outputs only."""
    draw = torch.Generator().manual_seed(_SEED)
    shape = (_WINDOWS, 3, grid.window_frames, grid.crop_pixels, grid.crop_pixels)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    mask = torch.ones((_WINDOWS, grid.feature_steps), dtype=torch.bool)
    mask[-1, grid.feature_steps // 2 :] = False
    expected = ours(frames, mask)
    inputs = f"random pixels, seed {_SEED}"
    return tuple(_parity(inputs, [_difference(expected, forward(frames, mask))], None) for forward in exports)


def partner_differences(ours: pa.Table, theirs: pa.Table) -> tuple[float, float]:
    """Largest difference of a start or an end, and of a score, between detections and their partners.

    Not row by row: of two detections whose scores are equal but for the last bit either may come first.

    Args:
        ours, theirs: DETECTION_SCHEMA.
    """
    if ours.equals(theirs):
        return 0.0, 0.0
    largest = np.zeros(2)
    theirs_by_group = _groups(theirs)
    for group, rows in _groups(ours).items():
        left = theirs_by_group.get(group, np.zeros((0, 3)))
        for row in rows[: len(left)]:
            differences = np.abs(left - row)
            nearest = differences.sum(axis=1).argmin()
            start, end, score = differences[nearest]
            largest = np.maximum(largest, (max(start, end), score))
            left = np.delete(left, nearest, axis=0)
    return float(largest[0]), float(largest[1])


def _groups(detections: pa.Table) -> dict[tuple[str, int], npt.NDArray[np.float64]]:
    """(video, label) -> (n, 3) of start, end, score, in the table's order."""
    groups: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    columns = (detections[name].to_pylist() for name in ("video", "label", "start", "end", "score"))
    for video, label, *numbers in zip(*columns, strict=True):
        groups.setdefault((video, label), []).append(tuple(numbers))
    return {group: np.array(rows) for group, rows in groups.items()}


def _difference(ours: DetectorOutput, theirs: DetectorOutput) -> Difference:
    # Points outside the video are left out: nothing is decoded there.
    alike = torch.equal(ours.mask, theirs.mask) and torch.equal(ours.points, theirs.points)
    logits, offsets = (
        float((a - b)[ours.mask].abs().max()) if alike else math.inf
        for a, b in ((ours.logits, theirs.logits), (ours.offsets, theirs.offsets))
    )
    return Difference(len(ours.mask), logits, offsets)


def _parity(inputs: str, differences: Sequence[Difference], detections: DetectionParity | None) -> Parity:
    logits, offsets = (  # NaN stays
        float(np.max([getattr(difference, name) for difference in differences]))
        for name in ("logits", "offsets")
    )
    windows = sum(difference.windows for difference in differences)
    return Parity(inputs, windows, logits, offsets, detections)
