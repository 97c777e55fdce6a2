"""Sections of a run's page about what came of it: cost against accuracy, the student beside the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pyarrow as pa

from pbd_ray.metrics.detad import ERRORS, Detad, diagnose
from pbd_ray.metrics.detad_rules import DetadRules
from pbd_ray.metrics.mean_ap import MetricError
from pbd_ray.report import panels
from pbd_ray.report.detection_figures import profile_info
from pbd_ray.report.evidence import Evidence
from pbd_ray.report.findings import ClassInfo, Comparison, PairInfo, comparison_info
from pbd_ray.report.parts import Figure, Part, Table, figure, row_height, signed
from pbd_ray.report.rounds import DepthInfo

MOST_CLASSES = 30
"""In the figure; the table has all."""

Pairs = Mapping[str, tuple[float, float]]
"""By group: (teacher's, student's)."""


def frontier_part(depths: Sequence[DepthInfo], headline: str) -> Part:
    """Accuracy against what a window costs."""
    costs = {"macs_ratio": "MACs", "latency_ratio": "measured latency", "params_ratio": "parameters"}
    figures = tuple(
        figure(
            f"frontier-{field}",
            f"{headline} against {name}.",
            (f"{one.blocks} blocks: {one.headline_map:.4f} at {getattr(one, field):.1%}" for one in depths),
            partial(panels.draw_cost, depths=depths, field=field, name=name, headline=headline),
        )
        for field, name in costs.items()
    )
    text = (
        "On the test videos; a bar is the interval of the difference to the teacher. MACs count every "
        "multiplication of the whole detector; latency is the median of one window on one worker."
    )
    return Part("What a window costs", text, figures)


def comparison_part(evidence: Evidence, student: pa.Table, headline: str) -> Part:
    """mAP by threshold and AP by class beside the teacher's.

    Args:
        student: detections of the last standing round.
    """
    experiment = evidence.recipe.experiment
    found = comparison_info(
        evidence.test, evidence.teacher.detections, student, experiment.evaluation, experiment.seed
    )
    columns = ("teacher", "student", "difference (interval)")
    by_tiou = Table("mAP by tIoU", ("tIoU", *columns), tuple((one.name, *_row(one)) for one in found.tious))
    by_class = Table(
        f"AP by class, {headline}",
        ("class", "instances", *columns),
        tuple((one.name, str(one.instances), *_row(one)) for one in found.classes),
    )
    figures = (_classes_figure(found.classes, headline),)
    return Part("The student beside the teacher", _caveats(found), figures, (by_tiou,), (by_class,))


def errors_part(evidence: Evidence, student: pa.Table, rules: DetadRules) -> Part:
    """DETAD of both detectors, side by side (paper's supplement, figures A and B)."""
    title = "Which errors changed"
    try:
        before = diagnose(evidence.test, evidence.teacher.detections, rules)
        after = diagnose(evidence.test, student, rules)
    except MetricError as problem:  # mAP counts instances that DETAD does not
        return Part(title, f"DETAD's error analysis has nothing to say: {problem}.")
    text = (
        "DETAD's error analysis of both on the test videos: what their detections are (G is the number of "
        "instances of a class), what mAP would gain without each kind of false positive, and which "
        "instances are missed."
    )
    gain = "What mAP_N would gain without a kind of false positive."
    figures = [
        _profile_figure("teacher", before),
        _profile_figure("student", after),
        _pairs_figure("gains", gain, gain_pairs(before, after), "gain (points of mAP_N)"),
    ]
    figures += [
        _pairs_figure(
            f"missed-{name}",
            f"Instances missed, by {name}; below a bucket its share of all instances.",
            missed_pairs(before, after, name),
            "instances missed (%)",
        )
        for name in before.false_negative_rate
    ]
    tables = (_false_positives(before, after), _false_negatives(before, after))
    return Part(title, text, tuple(figures), folded=tables)


def gain_pairs(teacher: Detad, student: Detad) -> dict[str, tuple[float, float]]:
    """By error type, what mAP_N gains without it, in points."""
    return {
        error.removesuffix(" Err").replace(" ", "\n"): (teacher.gain[error] * 100, student.gain[error] * 100)
        for error in ERRORS
    }


def missed_pairs(teacher: Detad, student: Detad, characteristic: str) -> dict[str, tuple[float, float]]:
    """By bucket with its share of the instances, how many of them are missed, in percent."""
    share, after = teacher.bucket_share[characteristic], student.false_negative_rate[characteristic]
    return {
        f"{bucket}\n{share[bucket]:.0%}": (rate * 100, after[bucket] * 100)
        for bucket, rate in teacher.false_negative_rate[characteristic].items()
    }


def _classes_figure(classes: Sequence[ClassInfo], headline: str) -> Figure:
    shown, more = tuple(classes), ""
    if len(classes) > MOST_CLASSES:
        half = MOST_CLASSES // 2
        shown = (*classes[:half], *classes[-half:])
        more = f" The {MOST_CLASSES} of {len(classes)} classes that changed most."
    return figure(
        "classes",
        f"AP of a class less the teacher's, {headline}.{more}",
        (f"{one.name} {signed(one.difference, one.low, one.high)}" for one in shown),
        partial(panels.draw_classes, classes=shown),
        row_height(len(shown)),
    )


def _profile_figure(who: str, detad: Detad) -> Figure:
    told = (
        f"{group}: " + ", ".join(f"{outcome} {share:.0%}" for outcome, share in shares.items())
        for group, shares in profile_info(detad)
    )
    caption = f"What the {who}'s detections are, the best first."
    return figure(f"profile-{who}", caption, told, partial(panels.draw_profile, detad=detad), 3.7)


def _pairs_figure(name: str, caption: str, pairs: Pairs, axis: str) -> Figure:
    told = (
        f"{' '.join(group.split())} {teacher:.1f}, {student:.1f}"
        for group, (teacher, student) in pairs.items()
    )
    draw = partial(panels.draw_pairs, pairs=pairs, name=axis)
    return figure(name, f"{caption} Teacher, then student.", told, draw)


def _false_positives(teacher: Detad, student: Detad) -> Table:
    columns = ("error", "teacher", "student", "gain without it, teacher", "gain, student")
    rows = tuple(
        (
            error,
            f"{teacher.error_counts[error]:.1f}",
            f"{student.error_counts[error]:.1f}",
            f"{teacher.gain[error]:.4f}",
            f"{student.gain[error]:.4f}",
        )
        for error in ERRORS
    )
    return Table(f"False positives among the best {teacher.rules.groups} G detections", columns, rows)


def _false_negatives(teacher: Detad, student: Detad) -> Table:
    columns = ("bucket", "share of instances", "missed by the teacher", "by the student", "difference")
    rows = tuple(
        (
            f"{name} {bucket}",
            f"{teacher.bucket_share[name][bucket]:.1%}",
            f"{rate:.4f}",
            f"{student.false_negative_rate[name][bucket]:.4f}",
            f"{student.false_negative_rate[name][bucket] - rate:+.4f}",
        )
        for name, buckets in teacher.false_negative_rate.items()
        for bucket, rate in buckets.items()
    )
    return Table("False negatives", columns, rows)


def _row(one: PairInfo) -> tuple[str, str, str]:
    return f"{one.teacher:.4f}", f"{one.student:.4f}", signed(one.difference, one.low, one.high)


def _caveats(found: Comparison) -> str:
    lines = [
        f"On the test videos. Intervals of the difference: {found.confidence:.0%}, paired BCa bootstrap over "
        f"{found.videos} videos, all detections of a video together."
    ]
    if found.unreliable:
        lines.append("With so few videos no interval is one to rely on.")
    if found.dropped_classes:
        lines.append(
            f"In {found.dropped_classes} (replicate, class) pairs the drawn videos held no instance of the "
            "class, which then left both means."
        )
    if found.absent:
        lines.append(f"Without an instance, and in no mean: {', '.join(found.absent)}.")
    return " ".join(lines)
