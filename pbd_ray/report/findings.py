"""What a run found out, as numbers: everything here is pure, the page only lays it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pbd_ray.config import EvaluationConfig
from pbd_ray.data.annotations import Annotations
from pbd_ray.metrics.bootstrap import evaluation_draws
from pbd_ray.metrics.intervals import MapInterval, Tiou, difference_intervals
from pbd_ray.metrics.mean_ap import Matches, match_detections, mean_ap_of, prepare_ground_truth
from pbd_ray.report.evidence import Evidence
from pbd_ray.report.rounds import DepthInfo

VERDICTS = {
    "holds": "Lossless within the margin",
    "undecided": "Undecided",
    "inferior": "Worse than the teacher",
}


@dataclass(frozen=True)
class PairInfo:
    """A number of the teacher's and of the student's, and the interval of student - teacher."""

    name: str
    """The threshold, or 'average'; of AP the class."""
    teacher: float
    student: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.student - self.teacher


@dataclass(frozen=True)
class ClassInfo(PairInfo):
    """AP of one class at the headline threshold."""

    instances: int


@dataclass(frozen=True)
class Comparison:
    """A student against its teacher on the test videos."""

    tious: tuple[PairInfo, ...]
    """The average last."""
    classes: tuple[ClassInfo, ...]
    """The largest loss first."""
    absent: tuple[str, ...]
    """Classes without an instance on the test videos: they are in no mean."""
    videos: int
    confidence: float
    unreliable: bool
    dropped_classes: int
    """(replicate, class) pairs of the average's interval in which the drawn videos held no instance."""


@dataclass(frozen=True)
class RateCurve:
    """One learning rate's fine-tuning run; epochs count from 1."""

    learning_rate: float
    outcome: str
    epochs: tuple[int, ...]
    selection_map: tuple[float | None, ...]
    total: tuple[float, ...]
    """Training loss, mean over the epoch."""

    @property
    def label(self) -> str:
        """The rate, and how its run ended if not after its last epoch."""
        ended = "" if self.outcome == "finished" else f" ({self.outcome})"
        return f"{self.learning_rate:.2g}{ended}"


def comparison_info(
    test: Annotations,
    teacher: pa.Table,
    student: pa.Table,
    rules: EvaluationConfig,
    seed: int,
) -> Comparison:
    """mAP at every threshold and AP of every class, with paired bootstrap intervals over videos.

    Args:
        test: the videos, with the labels that mAP compares with.
        teacher, student: DETECTION_SCHEMA rows.
        seed: of the recipe; all intervals draw the same videos, as those in the ledger did.
    """

    sizes = (rules.bootstrap_replicates, rules.confidence)
    truth = prepare_ground_truth(test.ground_truth(), len(test.classes), [video.id for video in test.videos])
    theirs, ours = (match_detections(truth, rows, rules.tious) for rows in (teacher, student))
    quality = {"teacher": mean_ap_of(theirs), "student": mean_ap_of(ours)}
    thresholds: tuple[Tiou, ...] = (*rules.tious, "average")
    intervals = difference_intervals(ours, theirs, thresholds, evaluation_draws(seed), *sizes)
    tious = []
    for tiou in thresholds:
        found = intervals[tiou].map
        values = {who: one.at(tiou) for who, one in quality.items()}
        name = "average" if tiou == "average" else f"{tiou:g}"
        tious.append(PairInfo(name, **values, low=found.low, high=found.high))
    return Comparison(
        tious=tuple(tious),
        classes=_classes(test, theirs, ours, rules, intervals[rules.headline_tiou].classes),
        absent=tuple(
            name for name, count in zip(test.classes, truth.counts.sum(axis=1), strict=True) if not count
        ),
        videos=found.videos,
        confidence=found.confidence,
        unreliable=found.unreliable,
        dropped_classes=found.dropped_classes,
    )


def _classes(
    test: Annotations,
    teacher: Matches,
    student: Matches,
    rules: EvaluationConfig,
    intervals: Mapping[int, MapInterval],
) -> tuple[ClassInfo, ...]:
    average = rules.headline_tiou == "average"
    rows = [row for row, tiou in enumerate(teacher.tious) if average or tiou == rules.headline_tiou]
    theirs, ours = (mean_ap_of(arm).ap[rows].mean(axis=0) for arm in (teacher, student))
    instances = teacher.ground_truth.counts.sum(axis=1)
    found = [
        ClassInfo(
            name=test.classes[label],
            teacher=float(theirs[label]),
            student=float(ours[label]),
            low=one.low,
            high=one.high,
            instances=int(instances[label]),
        )
        for label, one in intervals.items()
    ]
    return tuple(sorted(found, key=lambda one: (one.difference, one.name)))


def curves_info(curves: pa.Table) -> tuple[RateCurve, ...]:
    """The learning rates of a round's `alignment.parquet`, ascending."""
    found = []
    for rate in sorted(set(curves["learning_rate"].to_pylist())):
        rows = sorted(
            (row for row in curves.to_pylist() if row["learning_rate"] == rate), key=lambda row: row["epoch"]
        )
        found.append(
            RateCurve(
                learning_rate=rate,
                outcome=rows[0]["outcome"],
                epochs=tuple(row["epoch"] + 1 for row in rows),
                selection_map=tuple(row["selection_map"] for row in rows),
                total=tuple(row["total"] for row in rows),
            )
        )
    return tuple(found)


def answer_text(depths: Sequence[DepthInfo], entry: Mapping[str, Any] | None, headline: str) -> str:
    """The run's outcome in one sentence; 'lossless' only where non-inferiority holds.

    Args:
        entry: of the last standing round in summary.json; None before the first.
        headline: what headline mAP means, such as 'mAP@0.5'.
    """
    if entry is None:
        return f"No block is gone. The teacher reaches {headline} {depths[0].headline_map:.4f}."
    interval, last, teacher = entry["interval"], depths[-1], depths[0]
    dropped = [str(depth.dropped_block) for depth in depths[1:]]
    few = ", too few to rely on" if interval["unreliable"] else ""
    return (
        f"{VERDICTS[interval['verdict']]}: {len(dropped)} of {teacher.blocks} blocks are gone ("
        f"{', '.join(dropped)}). {headline} is {last.headline_map:.4f}, the teacher's "
        f"{teacher.headline_map:.4f}: a difference of {interval['difference']:+.4f}, "
        f"{interval['confidence']:.0%} interval [{interval['low']:+.4f}, {interval['high']:+.4f}] over "
        f"{interval['videos']} test videos{few}; the margin set beforehand is {interval['margin']:g}."
    )


def warnings_info(evidence: Evidence) -> tuple[str, ...]:
    """What a reader must know before believing the page, one sentence each."""
    summary, experiment = evidence.summary, evidence.recipe.experiment
    found = []
    if summary["stop_reason"] is None:
        found.append("The run is not over: this is how it stands after its last committed round.")
    if experiment.paper_protocol:
        found.append(
            "paper_protocol: epochs and learning rates were chosen on the test videos, as in the paper."
        )
    if not summary["bit_exact"]:
        changes = [line for change in evidence.environment["changes"] for line in change]
        found.append(
            "A later start ran under other conditions, so the result need not be bit for bit that of an "
            f"uninterrupted run: {'; '.join(dict.fromkeys(changes))}."
        )
    if summary["quarantined"]:
        left_out = len(summary["quarantined"])
        found.append(f"Videos that could not be used and are left out: {left_out}; they are listed below.")
    found += [
        f"Round {one['round']}, {one['rolled_back']}." for one in summary["rounds"] if not one["standing"]
    ]
    doubtful = [str(entry["round"]) for entry in summary["rounds"] if entry["undecided"]]
    if doubtful:
        rounds = ", ".join(doubtful)
        found.append(f"The selection videos leave open whether these rounds should stand: {rounds}.")
    for entry in summary["rounds"]:
        interval = entry["interval"]
        if interval["unreliable"]:
            found.append(f"Only {interval['videos']} test videos: no interval over them is one to rely on.")
            break
    given = [entry for entry in summary["rounds"] if entry["criterion"] == "given"]
    if given:
        found.append("The recipe named the blocks to drop (scoring.drops): nothing was scored.")
    found += [f"Round {entry['round']}: {entry['tie']}." for entry in summary["rounds"] if entry["tie"]]
    return tuple(found)
