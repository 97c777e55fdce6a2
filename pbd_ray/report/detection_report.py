"""Detections against ground truth, as files: metrics.json, detad.json and four figures."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pbd_ray.config import ConfigError
from pbd_ray.data.annotations import Annotations, load_annotations, read_detections
from pbd_ray.data.json_file import AnnotationError
from pbd_ray.metrics.detad import Detad, diagnose
from pbd_ray.metrics.detad_rules import DetadRules
from pbd_ray.metrics.intervals import MapInterval, map_interval
from pbd_ray.metrics.mean_ap import Matches, MeanAP, match_detections, mean_ap_of, prepare_ground_truth
from pbd_ray.report.output import write_files

log = logging.getLogger(__name__)

_BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Measures:
    """What an evaluation computes."""

    tious: tuple[float, ...]
    rules: DetadRules
    replicates: int = 1000
    """Of the bootstrap over videos that gives average mAP its interval; 0: none."""


@dataclass(frozen=True, eq=False)
class DetectionReport:
    """One set of detections, evaluated."""

    classes: tuple[str, ...]
    matches: Matches
    mean_ap: MeanAP
    interval: MapInterval | None
    detad: Detad
    facts: Mapping[str, Any]
    """Numbers of videos, instances and detections, and what was left out of them."""


def tious_of(text: str, option: str = "--tiou") -> tuple[float, ...]:
    """Thresholds from `start:stop:step` (stop is one of them), or from numbers between commas.

    A range is spaced as `numpy.linspace` spaces it, as in the official evaluators.

    Args:
        option: what the user wrote it for, for errors.

    Raises:
        ConfigError: neither, or a threshold outside (0, 1].
    """
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            count = round((stop - start) / step) + 1
            if not 1 <= count <= 1000 or abs(start + (count - 1) * step - stop) > 1e-6:
                raise ValueError
            tious = tuple(np.linspace(start, stop, count).tolist())
        else:
            tious = tuple(float(part) for part in text.split(","))
    except (ValueError, OverflowError, ZeroDivisionError):
        raise ConfigError(f"{option} {text!r} is not start:stop:step or numbers between commas") from None
    if not all(0 < tiou <= 1 for tiou in tious) or len(set(tious)) != len(tious):
        raise ConfigError(f"{option} {text!r}: expected distinct thresholds in (0, 1]")
    return tious


def evaluate_files(
    ground_truth: str | Path, predictions: str | Path, subset: str, measures: Measures
) -> DetectionReport:
    """Evaluate a detection file as the official evaluators do: published instances as they are, and
    detections of videos outside the subset as false positives (with a warning).

    Raises:
        UserError: a file, the subset, or what the two files have to do with each other is wrong.
    """
    annotations = load_annotations(ground_truth)
    videos = annotations.subset(subset)
    if not videos.videos:
        counted = sorted(Counter(video.subset for video in annotations.videos).items())
        known = ", ".join(f"{name!r} ({count})" for name, count in counted)
        raise AnnotationError(f"{ground_truth}: no video of subset {subset!r}; it holds {known}")
    found = read_detections(predictions, videos.classes)
    if found.unknown_labels and not found.table.num_rows:
        raise AnnotationError(f"{predictions}: no detection has a label of {ground_truth}")
    inside = {video.id for video in videos.videos}
    names = found.table.column("video").to_pylist()
    outside = [name for name in names if name not in inside]
    if outside:
        if len(outside) == len(names):
            raise AnnotationError(f"{predictions}: no detection is of a video of subset {subset!r}")
        log.warning(
            "%s: %d detections of %d videos outside subset %r count as false positives",
            predictions,
            len(outside),
            len(set(outside)),
            subset,
        )
    facts = {
        "subset": subset,
        "detections_of_unknown_labels_left_out": found.unknown_labels,
        "detections_of_other_videos": len(outside),
    }
    return evaluate_detections(videos, found.table, measures, facts)


def evaluate_detections(
    videos: Annotations, detections: pa.Table, measures: Measures, facts: Mapping[str, Any]
) -> DetectionReport:
    """Evaluate a DETECTION_SCHEMA table on all of `videos`.

    Raises:
        MetricError: no instance, or detections that cannot be scored.
    """
    table = videos.ground_truth()
    matches = match_detections(prepare_ground_truth(table, len(videos.classes)), detections, measures.tious)
    mean_ap = mean_ap_of(matches)
    interval = None
    if measures.replicates:
        rng = np.random.default_rng(_BOOTSTRAP_SEED)
        interval = map_interval(matches, "average", rng, measures.replicates)
    counts = {
        "videos": len(videos.videos),
        "instances": table.num_rows,
        "instances_left_out": mean_ap.removed_ground_truth,
        "detections": detections.num_rows,
    }
    return DetectionReport(
        classes=videos.classes,
        matches=matches,
        mean_ap=mean_ap,
        interval=interval,
        detad=diagnose(videos, detections, measures.rules),
        facts={**facts, **counts},
    )


def metrics_json(report: DetectionReport) -> dict[str, Any]:
    """`metrics.json`: `map` by tIoU, `average_map`, its interval, AP by class, and the facts."""
    mean_ap, interval = report.mean_ap, report.interval
    absent = np.isnan(mean_ap.ap[0])
    per_class = zip(report.classes, mean_ap.ap.T.tolist(), absent, strict=True)
    return {
        "map": {tiou_key(tiou): value for tiou, value in mean_ap.map.items()},
        "average_map": mean_ap.average_map,
        "average_map_interval": None
        if interval is None
        else {
            "low": interval.low,
            "high": interval.high,
            "confidence": interval.confidence,
            "method": f"{interval.method} bootstrap over videos",
            "replicates": interval.replicates,
            "unreliable": interval.unreliable,
        },
        "ap_by_class": {
            name: dict(zip(map(tiou_key, mean_ap.tious), column, strict=True))
            for name, column, missing in per_class
            if not missing
        },
        "classes_without_instances": [
            name for name, missing in zip(report.classes, absent, strict=True) if missing
        ],
        **report.facts,
    }


def detad_json(detad: Detad) -> dict[str, Any]:
    """`detad.json`: the analysis under the names that the original uses."""
    return {
        "tious": [tiou_key(tiou) for tiou in detad.rules.tious],
        "num_ground_truth": detad.num_ground_truth,
        "removed_ground_truth": detad.removed_ground_truth,
        "mAP_N": detad.map_n,
        "gain": detad.gain,
        f"error_counts_top{detad.rules.groups}G": detad.error_counts,
        "profile": {f"{index}G": shares for index, shares in enumerate(detad.profile, 1)},
        "false_negative_rate": detad.false_negative_rate,
        "bucket_share": detad.bucket_share,
        "mAP_N_all_detections": detad.base_map_n,
        "sensitivity": detad.sensitivity,
    }


def tiou_key(tiou: float) -> str:
    """A threshold as a key: two decimals, or as many as it takes ('0.30', '0.625')."""
    return f"{tiou:.2f}" if abs(tiou - round(tiou, 2)) < 1e-9 else f"{tiou:.6g}"


def write_report(
    report: DetectionReport, output: str | Path, more: Mapping[str, bytes] | None = None
) -> tuple[str, ...]:
    """Write all files of a report into a directory, made if need be; their names are returned.

    Everything is made before the first file is written, and every file appears whole.

    Raises:
        ConfigError: the directory cannot be made or written.
    """
    from pbd_ray.report import detection_figures as figures  # matplotlib takes longer than the numbers

    files = {
        **(more or {}),
        "metrics.json": _json(metrics_json(report)),
        "detad.json": _json(detad_json(report.detad)),
        "precision_recall.png": figures.draw_precision_recall(figures.precision_recall_info(report.matches)),
        "false_positives.png": figures.draw_false_positives(report.detad),
        "false_negatives.png": figures.draw_false_negatives(report.detad),
        "sensitivity.png": figures.draw_sensitivity(report.detad),
    }
    write_files(output, files)
    return tuple(files)


def summary_lines(report: DetectionReport) -> tuple[str, ...]:
    """The numbers a person looks at first."""
    mean_ap, interval, detad = report.mean_ap, report.interval, report.detad
    shown = ", ".join(f"mAP@{tiou_key(tiou)} {value:.4f}" for tiou, value in mean_ap.map.items())
    average = f"average mAP {mean_ap.average_map:.4f}"
    if interval is not None:
        average += f", {interval.confidence:.0%} interval [{interval.low:.4f}, {interval.high:.4f}]"
        average += " (few videos: unreliable)" if interval.unreliable else ""
    worst, gain = max(detad.gain.items(), key=lambda item: item[1])
    facts = report.facts
    return (
        f"{facts['detections']} detections, {facts['instances']} instances in {facts['videos']} videos",
        shown,
        average,
        f"mAP_N {detad.map_n:.4f}" + (f", {detad.map_n + gain:.4f} without {worst}" if gain > 0 else ""),
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


Say = Callable[[str], None]


def publish(
    report: DetectionReport, output: str | Path, say: Say, more: Mapping[str, bytes] | None = None
) -> None:
    """Write the report and say what it found and where."""
    names: Sequence[str] = write_report(report, output, more)
    for line in summary_lines(report):
        say(line)
    say(f"{output}: {', '.join(names)}")
