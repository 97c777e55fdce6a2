"""Why a temporal action detector errs: DETAD (Alwassel et al., ECCV 2018).

The definitions are those of the paper's released analysis, down to what the paper leaves open:

- Instances that do not last, or last longer than their video, are left out; duplicates stay.
- Detections are matched as in `mean_ap`. Normalised precision is r N / (r N + false positives) at recall
  r, with N the mean number of instances of a class; mAP_N is the mean over classes of its interpolated AP.
- mAP_N, errors, profile and gains look at the 10 G best detections of a class, G being its number of
  instances; false negatives and sensitivity look at all.
- A false positive is named after the instance of *any* class that it overlaps most; of instances
  overlapped alike, the one that stands first in its video (THUMOS14's CliffDiving instances are Diving
  instances too, so this decides Wrong Label and Confusion).

Where the original depends on the order an unstable sort leaves equal scores in, or equally overlapped
instances of one class, the numbers here may differ from a run of it, as two of its runs may: here the later
row comes first. Which of equal scores are among the 10 G best is fixed in both: the earlier rows. One
fault is not reproduced: in a video without ground truth the original compares all detections but
one with the instances of another video; here they are background errors. A class that has instances but
no detections, on which the original's sensitivity analysis stops, has AP 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pbd_ray.data.annotations import Annotations
from pbd_ray.metrics.detad_rules import THUMOS14, Bins, DetadRules
from pbd_ray.metrics.mean_ap import (
    Matches,
    MetricError,
    PreparedGroundTruth,
    match_detections,
    overlapping_pairs,
)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

ERRORS = ("Double Detection Err", "Wrong Label Err", "Localization Err", "Confusion Err", "Background Err")
OUTCOMES = ("True Positive", *ERRORS)
"""What a detection can be; its index is the outcome's code."""

Buckets = Mapping[str, Mapping[str, float]]
"""By characteristic, then by bucket; buckets without an instance are left out."""


@dataclass(frozen=True, eq=False)
class Detad:
    """One detector's analysis; all numbers are means over the rules' tIoU thresholds."""

    rules: DetadRules
    num_ground_truth: int
    removed_ground_truth: int
    map_n: float
    """mAP_N of the 10 G best detections."""
    gain: Mapping[str, float]
    """What mAP_N gains when every detection of an error type is taken away."""
    error_counts: Mapping[str, float]
    """Of OUTCOMES among the 10 G best detections."""
    profile: tuple[Mapping[str, float] | None, ...]
    """Shares of OUTCOMES among the G best detections, the next G, ...; None where there are no more."""
    false_negative_rate: Buckets
    bucket_share: Buckets
    """Of all instances that lie in some bucket."""
    base_map_n: float
    """mAP_N of all detections: what `sensitivity` compares with."""
    sensitivity: Buckets
    """mAP_N where only the bucket's instances are to be found, and detections of others are forgiven."""


@dataclass(frozen=True, eq=False)
class Misses:
    """Which instances a detector misses, as `Detad.false_negative_rate` counts them."""

    videos: int
    video: Ints
    """Index of the video of each instance; (G,)."""
    buckets: Mapping[str, Ints]
    """By characteristic and bucket ('length XS'), which of the G instances lie there; none is empty."""
    missed: Ints
    """At how many of the thresholds each one is missed; (G,)."""
    thresholds: int


def diagnose(annotations: Annotations, detections: pa.Table, rules: DetadRules = THUMOS14) -> Detad:
    """The whole analysis.

    Args:
        annotations: the videos of the subset, as published (`load_annotations(...)`).
        detections: DETECTION_SCHEMA; those of other videos are background errors.

    Raises:
        MetricError: no instance is left, or the detections cannot be scored.
    """
    instances = _instances(annotations, rules)
    matches = match_detections(instances.truth, detections, rules.tious)
    best = detections.take(_best_rows(matches, detections, rules.groups * instances.positives))
    best_matches = match_detections(instances.truth, best, rules.tious)
    labels = _labels(best_matches)
    codes = _outcomes(best_matches, best, instances, rules)
    counts = np.stack([np.bincount(row, minlength=len(OUTCOMES)) for row in codes]).mean(axis=0)
    map_n = _map_n(best_matches.true_positive, labels, instances)
    gains = {}
    for code, name in enumerate(ERRORS, 1):
        aps = [
            normalised_ap(flags[row != code], labels[row != code], instances.positives, instances.per_class)
            for flags, row in zip(best_matches.true_positive, codes, strict=True)
        ]
        gains[name] = float(np.nanmean(aps)) - map_n
    sensitivity: dict[str, dict[str, float]] = {
        name: _sensitivity(matches, bucket, bins, instances)
        for (name, bins), bucket in zip(rules.bins.items(), instances.buckets, strict=True)
    }
    rate, share = _false_negatives(matches, instances, rules)
    return Detad(
        rules=rules,
        num_ground_truth=len(instances.truth.segments_seconds),
        removed_ground_truth=instances.truth.removed,
        map_n=map_n,
        gain=gains,
        error_counts=dict(zip(OUTCOMES, counts.tolist(), strict=True)),
        profile=_profile(best_matches, codes, instances, rules.groups),
        false_negative_rate=rate,
        bucket_share=share,
        base_map_n=_map_n(matches.true_positive, _labels(matches), instances),
        sensitivity=sensitivity,
    )


def missed_instances(annotations: Annotations, detections: pa.Table, rules: DetadRules = THUMOS14) -> Misses:
    """The instances that the detections miss; arguments and errors are those of `diagnose`."""
    instances = _instances(annotations, rules)
    matches = match_detections(instances.truth, detections, rules.tious)
    key = np.repeat(np.arange(len(instances.truth.offsets) - 1), np.diff(instances.truth.offsets))
    buckets = {
        f"{name} {label}": np.flatnonzero(bucket == index)
        for (name, bins), bucket in zip(rules.bins.items(), instances.buckets, strict=True)
        for index, label in enumerate(bins.labels)
    }
    return Misses(
        videos=len(instances.truth.videos),
        video=key % len(instances.truth.videos),
        buckets={name: rows for name, rows in buckets.items() if len(rows)},
        missed=_missed(matches, instances, rules).sum(axis=0),
        thresholds=len(rules.tious),
    )


def normalised_ap(true: Flags, label: Ints, positives: Ints, per_class: float) -> Floats:
    """Interpolated AP_N of each class, nan for a class without instances; (C,).

    Args:
        true, label: of every detection, by class and within a class by falling score; (N,).
        positives: instances of each class; (C,).
        per_class: N of the paper, the mean number of instances of a class.
    """
    rows, nth = _hits(true, label)
    classes = label[rows]
    curve = np.zeros((len(positives), int(nth.max(initial=-1)) + 1))
    curve[classes, nth] = _precision_n(rows, nth, label, positives, per_class)
    envelope = np.maximum.accumulate(curve[:, ::-1], axis=1)
    undefined = np.full(len(positives), np.nan)
    return np.asarray(np.divide(envelope.sum(axis=1), positives, out=undefined, where=positives > 0))


@dataclass(frozen=True, eq=False)
class _Instances:
    """Ground truth as DETAD counts it."""

    truth: PreparedGroundTruth
    """By class and video."""
    scene: PreparedGroundTruth
    """The same instances by video alone, in file order, and..."""
    scene_labels: Ints
    """...their classes; (G,)."""
    buckets: tuple[Ints, ...]
    """Of each characteristic, the bucket of each instance of `truth`, -1 for none; (G,)."""

    @property
    def positives(self) -> Ints:
        """Instances of each class; (C,)."""
        return np.asarray(self.truth.counts.sum(axis=1))

    @property
    def per_class(self) -> float:
        return len(self.truth.segments_seconds) / np.count_nonzero(self.positives)


def _instances(annotations: Annotations, rules: DetadRules) -> _Instances:
    videos = annotations.videos
    if not any(len(video.labels) for video in videos):
        raise MetricError("ground truth has no instance: DETAD has nothing to analyse")
    video = np.repeat(np.arange(len(videos)), [len(one.labels) for one in videos])
    segments = np.concatenate([one.segments_seconds for one in videos])
    label = np.concatenate([one.labels for one in videos]).astype(np.int64)
    length = segments[:, 1] - segments[:, 0]
    with np.errstate(over="ignore"):  # an absurdly short video: infinite, so more than all of it
        coverage = length / np.array([one.duration_seconds for one in videos])[video]
    key = label * len(videos) + video
    together = np.bincount(key)[key]
    kept = (coverage <= 1) & (length > 0)
    if not kept.any():
        raise MetricError("no instance of the ground truth lasts, and at most as long as its video")
    order = np.flatnonzero(kept)
    order = order[np.argsort(key[order], kind="stable")]
    values = {"coverage": coverage[order], "length": length[order], "num-instances": together[order]}

    def prepared(rows: Ints, keys: Ints, num_classes: int) -> PreparedGroundTruth:
        sizes = np.bincount(keys[rows], minlength=num_classes * len(videos))
        return PreparedGroundTruth(
            videos=tuple(one.id for one in videos),
            restricted=False,
            num_classes=num_classes,
            segments_seconds=segments[rows],
            offsets=np.concatenate(([0], np.cumsum(sizes))),
            removed=int(np.count_nonzero(~kept)),
            without_duration=int(np.count_nonzero(length <= 0)),
        )

    return _Instances(
        truth=prepared(order, key, len(annotations.classes)),
        scene=prepared(np.flatnonzero(kept), video, 1),
        scene_labels=label[kept],
        buckets=tuple(_bucket(values[name], bins) for name, bins in rules.bins.items()),
    )


def _bucket(values: npt.NDArray[np.number], bins: Bins) -> Ints:
    edges = np.array(bins.edges)
    bucket = np.searchsorted(edges, values, side="left") - 1
    bucket[values == edges[0]] = 0
    bucket[bucket >= len(bins.labels)] = -1
    return bucket


def _labels(matches: Matches) -> Ints:
    """Class of every detection; (N,)."""
    return np.repeat(np.arange(matches.ground_truth.num_classes), np.diff(matches.class_offsets))


def _ranks(matches: Matches) -> Ints:
    """Place of every detection in its class, from 0; (N,)."""
    return np.arange(len(matches.rows)) - matches.class_offsets[_labels(matches)]


def _best_rows(matches: Matches, detections: pa.Table, most: Ints) -> Ints:
    """Rows of the `most` (C,) best detections of each class, in file order; of equal scores the first."""
    score = detections.column("score").to_numpy()[matches.rows]
    order = np.lexsort((matches.rows, -score, _labels(matches)))
    return np.sort(matches.rows[order][_ranks(matches) < most[_labels(matches)]])


def _hits(true: Flags, label: Ints) -> tuple[Ints, Ints]:
    """Rows of the true positives, and how many of its class came before each."""
    rows = np.flatnonzero(true)
    return rows, np.arange(len(rows)) - np.searchsorted(label[rows], label[rows])


def _precision_n(rows: Ints, nth: Ints, label: Ints, positives: Ints, per_class: float) -> Floats:
    """Normalised precision at each true positive (DETAD, equation 1)."""
    classes = label[rows]
    false = rows - np.searchsorted(label, classes) - nth
    found = (nth + 1) / positives[classes] * per_class
    return np.asarray(found / (found + false))


def _map_n(true_positive: Flags, label: Ints, instances: _Instances) -> float:
    """Mean over tIoU and classes with instances of AP_N."""
    aps = [normalised_ap(row, label, instances.positives, instances.per_class) for row in true_positive]
    return float(np.nanmean(aps))


def _outcomes(matches: Matches, detections: pa.Table, instances: _Instances, rules: DetadRules) -> Ints:
    """Code of every detection's outcome at each tIoU; (T, N)."""
    ends = [detections.column(name).to_numpy()[matches.rows] for name in ("start", "end")]
    nowhere = np.zeros(len(matches.rows), dtype=np.int64)
    least = min(rules.min_tiou, *rules.tious)
    detection, instance, overlap = overlapping_pairs(
        instances.scene, nowhere, matches.video, np.stack(ends, axis=1), least
    )
    order = np.lexsort((instance, -overlap, detection))
    first = order[np.diff(detection[order], prepend=-1) > 0]
    most, nearest = np.zeros(len(nowhere)), nowhere - 1
    most[detection[first]], nearest[detection[first]] = (
        overlap[first],
        instances.scene_labels[instance[first]],
    )
    right = nearest == _labels(matches)
    codes = []
    for tiou, flags in zip(rules.tious, matches.true_positive, strict=True):
        elsewhere = np.where(most >= rules.min_tiou, np.where(right, 3, 4), 5)
        row = np.where(most >= tiou, np.where(right, 1, 2), elsewhere)
        row[flags] = 0
        codes.append(row)
    return np.stack(codes)


def _profile(
    matches: Matches, codes: Ints, instances: _Instances, groups: int
) -> tuple[Mapping[str, float] | None, ...]:
    group = _ranks(matches) // np.maximum(instances.positives, 1)[_labels(matches)]
    cells = groups * len(OUTCOMES)
    counts = [np.bincount(group * len(OUTCOMES) + row, minlength=cells) for row in codes]
    shares = np.mean(counts, axis=0).reshape(groups, len(OUTCOMES))
    sizes = np.bincount(group, minlength=groups)
    return tuple(
        dict(zip(OUTCOMES, (row / size).tolist(), strict=True)) if size else None
        for row, size in zip(shares, sizes, strict=True)
    )


def _missed(matches: Matches, instances: _Instances, rules: DetadRules) -> Flags:
    """Whether each instance is missed at each tIoU: held by no detection, or only where precision is too
    low to count; (T, G)."""
    label = _labels(matches)
    missed = []
    for flags, holder in zip(matches.true_positive, matches.holder, strict=True):
        rows, nth = _hits(flags, label)
        precise = np.zeros(len(label) + 1, dtype=bool)  # the last entry: held by none
        precision = _precision_n(rows, nth, label, instances.positives, instances.per_class)
        precise[rows[precision > rules.min_precision]] = True
        missed.append(~precise[holder])
    return np.stack(missed)


def _false_negatives(
    matches: Matches, instances: _Instances, rules: DetadRules
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """(missed share of every bucket's instances, every bucket's share of the instances)."""
    missed = _missed(matches, instances, rules)
    rates: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    for (name, bins), bucket in zip(rules.bins.items(), instances.buckets, strict=True):
        inside = np.bincount(bucket[bucket >= 0], minlength=len(bins.labels))
        lost = [np.bincount(bucket[row & (bucket >= 0)], minlength=len(inside)) for row in missed]
        used = np.flatnonzero(inside)
        rate = np.mean([row[used] / inside[used] for row in lost], axis=0)
        share = inside[used] / inside.sum()
        names = [bins.labels[index] for index in used]
        rates[name] = dict(zip(names, rate.tolist(), strict=True))
        shares[name] = dict(zip(names, share.tolist(), strict=True))
    return rates, shares


def _sensitivity(matches: Matches, bucket: Ints, bins: Bins, instances: _Instances) -> dict[str, float]:
    """mAP_N of each bucket: its instances alone are to be found, and a detection that found an instance
    outside it, at any of the thresholds, is no detection."""
    label = _labels(matches)
    free = -2
    found = np.full(matches.true_positive.shape, free)  # bucket of the instance each detection holds
    for row, holder in enumerate(matches.holder):
        held = np.flatnonzero(holder >= 0)
        found[row, holder[held]] = bucket[held]
    of_class = np.repeat(np.arange(len(instances.positives)), instances.positives)
    result = {}
    for index, name in enumerate(bins.labels):
        positives = np.bincount(of_class[bucket == index], minlength=len(instances.positives))
        if positives.any():
            kept = ((found == free) | (found == index)).all(axis=0)
            aps = [
                normalised_ap(row[kept], label[kept], positives, instances.per_class)
                for row in matches.true_positive
            ]
            result[name] = float(np.nanmean(np.mean(aps, axis=0)))
    return result
