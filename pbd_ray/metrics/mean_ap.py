"""Mean average precision of temporal detection, as the official ActivityNet evaluator defines it.

Equal to that evaluator and to OpenTAD's, but vectorised over classes, videos and tIoU thresholds.
Ground truth is prepared once and scores any number of detection tables. What an evaluator leaves out or
counts as 0 without a word (classes, instances, detections) is counted in a logged warning.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pbd_ray.config import UserError

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DUPLICATE_SECONDS = 1e-3
"""Two instances of a class whose boundaries both differ by no more are one (OpenTAD)."""
PAIR_CHUNK = 1_000_000
"""(detection, instance) pairs whose overlap is computed at a time."""


class MetricError(UserError):
    """Ground truth or detections cannot be scored. The message is one line."""


@dataclass(frozen=True, eq=False)
class PreparedGroundTruth:
    """Ground truth indexed by (class, video), duplicates and empty instances removed.

    Instances of key = label * len(videos) + video are rows offsets[key]:offsets[key + 1] of
    `segments_seconds` (G, 2), in input order.
    """

    videos: tuple[str, ...]
    restricted: bool
    """Detections of other videos are ignored (True), or count as false positives (False)."""
    num_classes: int
    segments_seconds: Floats
    offsets: Ints
    removed: int
    """Instances left out: duplicates and those without a duration."""
    without_duration: int
    """How many of the removed end where they start, or before."""

    @property
    def counts(self) -> Ints:
        """Instances of each (class, video); (C, V)."""
        return np.diff(self.offsets).reshape(self.num_classes, len(self.videos))


@dataclass(frozen=True, eq=False)
class Matches:
    """Every scored detection and whether it is a true positive.

    Sorted by class, within a class by falling score. A match depends on the detections of its own
    video only, so any re-weighting of the videos keeps `true_positive`.
    """

    ground_truth: PreparedGroundTruth
    tious: tuple[float, ...]
    foreign_videos: tuple[str, ...]
    """Detected videos without ground truth; video index len(ground_truth.videos) and up."""
    rows: Ints
    """Row of the detection table; (N,)."""
    video: Ints
    class_offsets: Ints
    """Class c is class_offsets[c]:class_offsets[c + 1]; (C + 1,)."""
    true_positive: npt.NDArray[np.bool_]
    """(T, N)."""
    holder: Ints
    """Which detection (0 .. N - 1) holds each instance of the ground truth, -1: none does; (T, G)."""


@dataclass(frozen=True, eq=False)
class MeanAP:
    """ap is (T, C), nan for a class without ground truth; such classes are left out of the means."""

    tious: tuple[float, ...]
    ap: Floats
    map: dict[float, float]
    average_map: float
    absent_classes: int
    """Classes without ground truth: if not 0, say so beside the number."""
    undetected_classes: int
    """Classes with ground truth and without a detection: their AP is 0."""
    removed_ground_truth: int

    def at(self, tiou: float | str) -> float:
        """mAP at a threshold, or the average for 'average'."""
        return self.average_map if tiou == "average" else self.map[float(tiou)]


def mean_average_precision(
    ground_truth: pa.Table | PreparedGroundTruth,
    detections: pa.Table,
    tious: Sequence[float],
    num_classes: int,
    videos: Sequence[str] | None = None,
) -> MeanAP:
    """Interpolated mAP at each tIoU and its average (ActivityNet; no detections score 0).

    Args:
        ground_truth: GROUND_TRUTH_SCHEMA, or what `prepare_ground_truth` made of it (then `videos`
            was chosen there).
        detections: DETECTION_SCHEMA.
        tious: thresholds in (0, 1].
        num_classes: labels are 0 .. num_classes - 1.
        videos: score only these; None: all.

    Raises:
        MetricError: no ground truth, a threshold or label out of range, a score or boundary that is not
            finite.
    """
    if isinstance(ground_truth, PreparedGroundTruth):
        assert videos is None and ground_truth.num_classes == num_classes
        prepared = ground_truth
    else:
        prepared = prepare_ground_truth(ground_truth, num_classes, videos)
    return mean_ap_of(match_detections(prepared, detections, tious))


def prepare_ground_truth(
    ground_truth: pa.Table, num_classes: int, videos: Sequence[str] | None = None
) -> PreparedGroundTruth:
    """Index a GROUND_TRUTH_SCHEMA table once for any number of detection tables.

    As OpenTAD, an instance that does not last (end <= start) and one within 1 ms of an earlier one of
    the same class and video are removed.

    Args:
        videos: score only these (blocked videos left out, one subset); None: those of the table, and
            a detection of any other video is a false positive.
    """
    names = ground_truth.column("video")
    known = tuple(dict.fromkeys(names.to_pylist())) if videos is None else tuple(dict.fromkeys(videos))
    video, _ = _video_indices(names, known)
    label = _labels(ground_truth, num_classes, "ground truth")
    segments = _segments(ground_truth, "ground truth")
    inside = np.flatnonzero(video < len(known))
    key = label * len(known) + video
    lasting = inside[segments[inside, 1] - segments[inside, 0] > 0]
    order = lasting[np.argsort(key[lasting], kind="stable")]
    order = order[~_duplicates(key[order], segments[order])]
    sizes = np.bincount(key[order], minlength=num_classes * len(known))
    return PreparedGroundTruth(
        videos=known,
        restricted=videos is not None,
        num_classes=num_classes,
        segments_seconds=segments[order],
        offsets=np.concatenate(([0], np.cumsum(sizes))),
        removed=len(inside) - len(order),
        without_duration=len(inside) - len(lasting),
    )


def match_detections(
    ground_truth: PreparedGroundTruth, detections: pa.Table, tious: Sequence[float]
) -> Matches:
    """Assign detections to instances, greedily by score, at every tIoU (ActivityNet evaluator).

    In falling score, each detection takes the instance of its class and video that it overlaps most
    among those not taken, if it overlaps it at least by the threshold. Equal scores: the later row
    first, as `argsort()[::-1]` there (with a stable sort, so that the order is the same everywhere).
    """
    if not len(tious) or not all(0 < tiou <= 1 for tiou in tious):
        raise MetricError(f"tIoU thresholds {[float(tiou) for tiou in tious]} are not numbers in (0, 1]")
    video, foreign = _video_indices(detections.column("video"), ground_truth.videos)
    label = _labels(detections, ground_truth.num_classes, "detections")
    segments = _segments(detections, "detections")
    score = detections.column("score").to_numpy().astype(np.float64, copy=False)
    if not np.isfinite(score).all():
        raise MetricError(f"detections: score {score[~np.isfinite(score)][0]} is not finite")
    rows = np.argsort(score, kind="stable")[::-1]
    if ground_truth.restricted:
        rows, foreign = rows[video[rows] < len(ground_truth.videos)], ()
    # The narrowest integer type: numpy sorts 16-bit keys by radix.
    narrow = label[rows].astype(np.min_scalar_type(ground_truth.num_classes))
    rows = rows[np.argsort(narrow, kind="stable")]
    label, video, segments = label[rows], video[rows], segments[rows]

    least = float(min(tious))
    detection, instance, overlap = overlapping_pairs(ground_truth, label, video, segments, least)
    order = np.lexsort((-instance, -overlap, detection))  # equal overlap: the later instance, as there
    detection, instance, overlap = detection[order], instance[order], overlap[order]
    true_positive = np.zeros((len(tious), len(rows)), dtype=bool)
    holder = np.full((len(tious), len(ground_truth.segments_seconds)), -1)
    for row, tiou in enumerate(tious):
        enough = overlap >= tiou
        held, holders = _assign(detection[enough], instance[enough], ground_truth)
        true_positive[row, holders] = True
        holder[row, held] = holders
    return Matches(
        ground_truth=ground_truth,
        tious=tuple(float(tiou) for tiou in tious),
        foreign_videos=foreign,
        rows=rows,
        video=video,
        class_offsets=np.searchsorted(label, np.arange(ground_truth.num_classes + 1)),
        true_positive=true_positive,
        holder=holder,
    )


def mean_ap_of(matches: Matches) -> MeanAP:
    """mAP from matches: area under the precision envelope, mean over classes with ground truth.

    The envelope only steps at true positives, each of which adds 1 / positives of recall. Logs what was
    left out or counts as 0; the same line once a process, as a run scores the same videos again and again.
    """
    positives = matches.ground_truth.counts.sum(axis=1)
    present = positives > 0
    if not present.any():
        raise MetricError("ground truth has no instance: mAP is undefined")
    ap = np.full((len(matches.tious), len(positives)), np.nan)
    for label in np.flatnonzero(present):
        span = slice(matches.class_offsets[label], matches.class_offsets[label + 1])
        for row, flags in enumerate(matches.true_positive[:, span]):
            rank = np.flatnonzero(flags)
            precision = np.arange(1, len(rank) + 1) / (rank + 1)
            envelope = np.maximum.accumulate(precision[::-1])
            ap[row, label] = envelope.sum() / positives[label]
    means = ap[:, present].mean(axis=1)
    detected = np.diff(matches.class_offsets)
    _warn(matches.ground_truth, present, detected)
    return MeanAP(
        tious=matches.tious,
        ap=ap,
        map={tiou: float(value) for tiou, value in zip(matches.tious, means, strict=True)},
        average_map=float(means.mean()),
        absent_classes=int((~present).sum()),
        undetected_classes=int((detected[present] == 0).sum()),
        removed_ground_truth=matches.ground_truth.removed,
    )


def _warn(ground_truth: PreparedGroundTruth, present: npt.NDArray[np.bool_], detected: Ints) -> None:
    """Count what does not show in the number: (C,) classes with instances, (C,) detections of each."""
    duplicates = ground_truth.removed - ground_truth.without_duration
    if ground_truth.removed:
        _warn_once(
            f"mAP: {ground_truth.removed} ground-truth instances left out: {ground_truth.without_duration} "
            f"without a duration, {duplicates} within {DUPLICATE_SECONDS:g} s of an earlier one"
        )
    absent = ~present
    if absent.any():
        _warn_once(
            f"mAP: {absent.sum()} of {len(absent)} classes have no instance in the ground truth and leave "
            f"the mean, with {detected[absent].sum()} detections"
        )
    undetected = present & (detected == 0)
    if undetected.any():
        what = "no detections at all" if not detected.any() else "classes without a detection"
        _warn_once(
            f"mAP: {what}: {undetected.sum()} of {present.sum()} classes with instances have an AP of 0"
        )


@functools.cache
def _warn_once(line: str) -> None:
    log.warning(line)


def _assign(detection: Ints, instance: Ints, ground_truth: PreparedGroundTruth) -> tuple[Ints, Ints]:
    """Held instances and who holds them, from acceptable pairs sorted by detection, then preference.

    Choosing in turn is a stable matching in which every instance prefers the earlier detection, and
    as all instances agree on that order it is the only one (Gale and Shapley 1962). So all free
    detections of all classes and videos may propose at once, an instance keeping the earliest.
    """
    nobody = np.iinfo(np.int64).max
    holder = np.full(len(ground_truth.segments_seconds), nobody)  # position of the pair that holds it
    position = np.flatnonzero(np.diff(detection, prepend=-1))
    while len(position):
        wanted = instance[position]
        before = holder[wanted]
        np.minimum.at(holder, wanted, position)
        displaced = before[(before != nobody) & (holder[wanted] != before)]
        refused = position[holder[wanted] != position]
        free = np.unique(np.concatenate((displaced, refused))) + 1
        free = free[free < len(detection)]
        position = free[detection[free] == detection[free - 1]]
    held = np.flatnonzero(holder != nobody)
    return held, detection[holder[held]]


def overlapping_pairs(
    ground_truth: PreparedGroundTruth, label: Ints, video: Ints, segments: Floats, least: float
) -> tuple[Ints, Ints, Floats]:
    """(detection, instance, tIoU) of all pairs of one class and video with tIoU >= least."""
    ours = np.flatnonzero(video < len(ground_truth.videos))
    key = label[ours] * len(ground_truth.videos) + video[ours]
    begin, size = ground_truth.offsets[key], ground_truth.offsets[key + 1] - ground_truth.offsets[key]
    ours, begin, size = ours[size > 0], begin[size > 0], size[size > 0]
    ends = np.cumsum(size)
    parts: list[tuple[Ints, Ints, Floats]] = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    low = 0
    while low < len(ours):
        done = ends[low] - size[low]
        high = max(low + 1, int(np.searchsorted(ends, done + PAIR_CHUNK)))
        count = size[low:high]
        detection = np.repeat(ours[low:high], count)
        within = np.arange(len(detection)) - np.repeat(ends[low:high] - count - done, count)
        instance = np.repeat(begin[low:high], count) + within
        ours_at, theirs = segments[detection], ground_truth.segments_seconds[instance]
        shared = np.minimum(ours_at[:, 1], theirs[:, 1]) - np.maximum(ours_at[:, 0], theirs[:, 0])
        np.maximum(shared, 0, out=shared)
        union = (theirs[:, 1] - theirs[:, 0]) + (ours_at[:, 1] - ours_at[:, 0]) - shared
        overlap = shared / np.maximum(union, 1e-8)
        enough = overlap >= least
        parts.append((detection[enough], instance[enough], overlap[enough]))
        low = high
    detections, instances, overlaps = zip(*parts, strict=True)
    return np.concatenate(detections), np.concatenate(instances), np.concatenate(overlaps)


def _duplicates(key: Ints, segments: Floats) -> npt.NDArray[np.bool_]:
    """Instances within the tolerance of an earlier kept one of the same key; keys are sorted."""
    duplicate = np.zeros(len(key), dtype=bool)
    order = np.lexsort((segments[:, 0], key))
    near = (np.diff(key[order]) == 0) & (np.diff(segments[order, 0]) <= 2 * DUPLICATE_SECONDS)
    for suspect in np.unique(key[order][1:][near]):  # few: compare in full only where starts are close
        kept: list[int] = []
        for row in range(*np.searchsorted(key, (suspect, suspect + 1))):
            if kept and (np.abs(segments[kept] - segments[row]) <= DUPLICATE_SECONDS).all(axis=1).any():
                duplicate[row] = True
            else:
                kept.append(row)
    return duplicate


def _video_indices(names: pa.ChunkedArray, known: tuple[str, ...]) -> tuple[Ints, tuple[str, ...]]:
    """Index of each name in `known`, then in the further names, which are returned."""
    encoded = names.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    place = {name: index for index, name in enumerate(known)}
    table = [place.setdefault(name, len(place)) for name in encoded.dictionary.to_pylist()]
    indices = np.asarray(table, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
    return indices, tuple(place)[len(known) :]


def _labels(table: pa.Table, num_classes: int, what: str) -> Ints:
    label: Ints = table.column("label").to_numpy().astype(np.int64)
    wrong = (label < 0) | (label >= num_classes)
    if wrong.any():
        raise MetricError(f"{what}: label {label[wrong][0]} is not in 0..{num_classes - 1}")
    return label


def _segments(table: pa.Table, what: str) -> Floats:
    segments = np.stack([table.column(name).to_numpy() for name in ("start", "end")], axis=1)
    bad = ~np.isfinite(segments).all(axis=1)
    if bad.any():
        raise MetricError(f"{what}: segment {segments[bad][0].tolist()} is not finite")
    return segments.astype(np.float64, copy=False)
