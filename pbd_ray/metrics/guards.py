"""What a student may not lose however well it keeps mAP: a class, or a kind of instance that it then misses.

Each guard is a difference of student and teacher on the same videos with its paired bootstrap interval, as
mAP has one: the video is the unit. Guards are judged one by one; nothing is corrected for their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pbd_ray.metrics.bootstrap import Floats, bootstrap
from pbd_ray.metrics.detad import Ints, Misses
from pbd_ray.metrics.intervals import RELIABLE_VIDEOS, Tiou, Verdict, difference_intervals, noninferiority
from pbd_ray.metrics.mean_ap import Matches

GUARDED = {"class_loss": "AP of", "false_negative_rise": "share missed of"}
"""What a guard watches, in words before its name."""


@dataclass(frozen=True)
class Guard:
    """One class or bucket, student minus teacher."""

    what: Literal["class_loss", "false_negative_rise"]
    name: str
    """The class, or the characteristic and bucket ('length XS')."""
    difference: float
    """Of AP, or of the share of the bucket's instances that is missed."""
    low: float
    high: float
    limit: float
    """How much AP may fall, or the share may rise."""
    verdict: Verdict
    """inferior: the whole interval is beyond the limit; holds: none of it; undecided: a part of it."""
    videos: int
    unreliable: bool
    """Too few videos to decide on."""
    left_out: int
    """Replicates whose videos held no instance of it. The interval comes from the others."""


def class_loss_guards(
    student: Matches,
    teacher: Matches,
    tiou: Tiou,
    classes: Sequence[str],
    limit: float,
    rng: np.random.Generator,
    replicates: int,
    confidence: float,
) -> tuple[Guard, ...]:
    """One guard for every class with instances: AP at `tiou` may fall by `limit`.

    Args:
        classes: names by label.

    Raises:
        MetricError: as `difference_intervals`.
    """
    found = difference_intervals(student, teacher, (tiou,), rng, replicates, confidence)[tiou].classes
    return tuple(
        Guard(
            what="class_loss",
            name=classes[label],
            difference=one.value,
            low=one.low,
            high=one.high,
            limit=limit,
            verdict=noninferiority(one.low, one.high, limit),
            videos=one.videos,
            unreliable=one.unreliable,
            left_out=one.dropped_classes,
        )
        for label, one in found.items()
    )


def false_negative_guards(
    student: Misses,
    teacher: Misses,
    limit: float,
    rng: np.random.Generator,
    replicates: int,
    confidence: float,
) -> tuple[Guard, ...]:
    """One guard for every DETAD bucket with instances: the share of them that is missed may rise by `limit`.

    Which instances a detector misses is decided once, on all videos (a match below DETAD's least precision
    counts as a miss, and precision is that of the whole set); a replicate only weighs them.
    """
    assert np.array_equal(student.video, teacher.video), "the arms were matched on different instances"
    more = student.missed - teacher.missed
    rows_of = student.buckets.values()
    rise = np.column_stack([_by_video(student, rows, more[rows]) for rows in rows_of])
    instances = np.column_stack([_by_video(student, rows, np.ones_like(rows)) for rows in rows_of])

    def statistics(weights: Floats) -> Floats:
        # Sums of integers, exact in any order: a division is all that rounds.
        counted = student.thresholds * (weights @ instances)
        undefined = np.full(counted.shape, np.nan)
        shares: Floats = np.divide(weights @ rise, counted, out=undefined, where=counted > 0)
        return shares

    found = bootstrap(statistics, student.videos, rng, replicates, confidence)
    guards = []
    for column, name in enumerate(student.buckets):
        low, high = found.interval(column)
        guards.append(
            Guard(
                what="false_negative_rise",
                name=name,
                difference=float(found.value[column]),
                low=low,
                high=high,
                limit=limit,
                verdict=noninferiority(-high, -low, limit),
                videos=student.videos,
                unreliable=student.videos < RELIABLE_VIDEOS,
                left_out=int(np.isnan(found.drawn[:, column]).sum()),
            )
        )
    return tuple(guards)


def _by_video(misses: Misses, rows: Ints, values: Ints) -> Floats:
    """Sums over the instances `rows` of each video; (V,)."""
    return np.bincount(misses.video[rows], values, minlength=misses.videos).astype(np.float64)
