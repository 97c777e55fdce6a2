"""DETAD against a loop-by-loop analysis written here from the paper, and corner cases by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations, Video
from pbd_ray.metrics.detad import ERRORS, OUTCOMES, Detad, diagnose, normalised_ap
from pbd_ray.metrics.detad_rules import ACTIVITYNET, THUMOS14, Bins, DetadRules
from pbd_ray.metrics.mean_ap import MetricError

Row = tuple[str, float, float, int, float]
"""A detection: video, start, end, label, score."""
INFINITY = float("inf")

RULES = DetadRules(
    tious=(0.3, 0.5, 0.7),
    bins={
        "coverage": Bins(edges=(0, 0.1, 0.2, 1), labels=("S", "M", "L")),
        "length": Bins(edges=(0, 2, 4, INFINITY), labels=("S", "M", "L")),
        "num-instances": Bins(edges=(-1, 1, 2, INFINITY), labels=("one", "two", "more")),
    },
    groups=4,
)


@dataclass(frozen=True, eq=False)
class Instance:
    video: str
    start: float
    end: float
    label: int
    buckets: Mapping[str, str] = field(default_factory=dict)


def annotations_of(
    videos: Mapping[str, Sequence[tuple[float, float, int]]], duration: float = 20.0, classes: int = 3
) -> Annotations:
    """Videos with instances (start, end, label)."""
    made = [
        Video(
            id=name,
            path=f"{name}.mp4",
            subset="validation",
            duration_seconds=duration,
            fps=10.0,
            frames=int(duration * 10),
            segments_seconds=np.array([row[:2] for row in rows], np.float64).reshape(-1, 2),
            labels=np.array([row[2] for row in rows], np.int32),
        )
        for name, rows in videos.items()
    ]
    return Annotations(tuple(f"c{index}" for index in range(classes)), tuple(made))


def table_of(rows: Sequence[Row]) -> pa.Table:
    return pa.table(list(map(list, zip(*rows, strict=True))) or [[]] * 5, schema=DETECTION_SCHEMA)


def crowded(seed: int, ties: bool = False) -> tuple[Annotations, list[Row]]:
    """Seven videos in which many detections overlap several instances, some of them twice or of two classes;
    two videos without instances, one that is not annotated, and a class without instances."""
    rng = np.random.default_rng(seed)

    def segment(low: float, high: float) -> tuple[float, float]:
        start = rng.uniform(0, 12)
        return float(start), float(start + rng.uniform(low, high))

    videos: dict[str, list[tuple[float, float, int]]] = {"empty0": [], "empty1": []}
    for index in range(7):
        rows = [(*segment(0.5, 6), int(rng.integers(3))) for _ in range(rng.integers(1, 7))]
        rows.append((rows[0][0], rows[0][1], int(rng.integers(3))))  # the same moment, perhaps another class
        videos[f"v{index}"] = rows
    videos["v0"] += [(1.0, 30.0, 0), (5.0, 5.0, 1)]  # longer than its video; lasts no time
    found: list[Row] = []
    for name in [*videos, "unknown"]:
        for start, end, label in videos.get(name, []):
            for _ in range(3):
                moved = sorted((start + rng.normal(0, 0.6), end + rng.normal(0, 0.6)))
                other = int(rng.integers(4)) if rng.random() < 0.2 else label
                found.append((name, float(moved[0]), float(moved[1]), other, float(rng.uniform())))
        found += [
            (name, *segment(0.5, 6), int(rng.integers(4)), float(rng.uniform(0, 0.8))) for _ in range(12)
        ]
    if ties:
        found = [(*row[:4], round(row[4], 1)) for row in found]
    order = rng.permutation(len(found))
    return annotations_of(videos, classes=5), [found[index] for index in order]


class Naive:
    """The paper's analysis and, where it is silent, the released one's, a detection at a time."""

    def __init__(self, annotations: Annotations, rows: Sequence[Row], rules: DetadRules) -> None:
        self.rules = rules
        self.instances: list[Instance] = []
        for video in annotations.videos:
            together = Counter(video.labels.tolist())
            segments = video.segments_seconds.tolist()
            for (start, end), label in zip(segments, video.labels.tolist(), strict=True):
                values = {
                    "coverage": (end - start) / video.duration_seconds,
                    "length": end - start,
                    "num-instances": together[label],
                }
                if end > start and values["coverage"] <= 1:
                    buckets = {name: self.bucket(values[name], bins) for name, bins in rules.bins.items()}
                    self.instances.append(Instance(video.id, start, end, label, buckets))
        self.classes = sorted({one.label for one in self.instances})
        self.count = Counter(one.label for one in self.instances)
        self.per_class = len(self.instances) / len(self.classes)
        self.all = {label: [row for row in rows if row[3] == label] for label in self.classes}
        # Of equal scores the earlier rows are among the best, and then the later one comes first.
        self.best = {
            label: sorted(found, key=lambda row: -row[4])[: rules.groups * self.count[label]]
            for label, found in self.all.items()
        }

    @staticmethod
    def bucket(value: float, bins: Bins) -> str:
        for low, high, name in zip(bins.edges, bins.edges[1:], bins.labels, strict=False):
            if low < value <= high or (low == value == bins.edges[0]):
                return name
        return ""

    @staticmethod
    def overlap(row: Row, one: Instance) -> float:
        if row[0] != one.video:
            return 0.0
        shared = max(0.0, min(row[2], one.end) - max(row[1], one.start))
        return shared / ((one.end - one.start) + (row[2] - row[1]) - shared)

    def matched(self, found: Sequence[Row], label: int, tiou: float) -> list[tuple[Row, Instance | None]]:
        """Detections of a class by falling score, each with the instance it finds."""
        order = sorted(range(len(found)), key=lambda index: (found[index][4], index), reverse=True)
        free = [one for one in self.instances if one.label == label]
        result: list[tuple[Row, Instance | None]] = []
        for index in order:
            best: Instance | None = None
            for one in free:
                if self.overlap(found[index], one) >= max(
                    tiou, 0.0 if best is None else self.overlap(found[index], best)
                ):
                    best = one
            if best is not None:
                free = [one for one in free if one is not best]
            result.append((found[index], best))
        return result

    def ap(self, hits: Sequence[bool], positives: int) -> float:
        """Area under the interpolated curve of recall and normalised precision."""
        curve, true = [], 0
        for place, hit in enumerate(hits, 1):
            true += hit
            weight = true / positives * self.per_class
            curve.append((true / positives, weight / (weight + place - true)))
        area, before = 0.0, 0.0
        for index, (recall, _) in enumerate(curve):
            area += (recall - before) * max(precision for _, precision in curve[index:])
            before = recall
        return area

    def map_n(self, detections: Mapping[int, Sequence[Row]], without: str = "") -> float:
        aps = []
        for tiou in self.rules.tious:
            for label in self.classes:
                pairs = self.matched(detections[label], label, tiou)
                hits = [one is not None for row, one in pairs if self.outcome(row, one, tiou) != without]
                aps.append(self.ap(hits, self.count[label]))
        return fmean(aps)

    def outcome(self, row: Row, one: Instance | None, tiou: float) -> str:
        if one is not None:
            return "True Positive"
        most, label = 0.0, -1
        for other in self.instances:
            if self.overlap(row, other) > most:
                most, label = self.overlap(row, other), other.label
        if most >= tiou:
            return "Double Detection Err" if label == row[3] else "Wrong Label Err"
        if most >= self.rules.min_tiou:
            return "Localization Err" if label == row[3] else "Confusion Err"
        return "Background Err"

    def profile(self) -> list[dict[str, float] | None]:
        groups: list[dict[str, float] | None] = []
        for group in range(self.rules.groups):
            seen: Counter[str] = Counter()
            for tiou in self.rules.tious:
                for label in self.classes:
                    pairs = self.matched(self.best[label], label, tiou)
                    span = slice(group * self.count[label], (group + 1) * self.count[label])
                    seen.update(self.outcome(row, one, tiou) for row, one in pairs[span])
            total = seen.total()
            groups.append({name: seen[name] / total for name in OUTCOMES} if total else None)
        return groups

    def missed(self, tiou: float) -> list[Instance]:
        """Instances that no detection finds where normalised precision is above the least."""
        found = []
        for label in self.classes:
            true = 0
            for place, (_, one) in enumerate(self.matched(self.all[label], label, tiou), 1):
                true += one is not None
                weight = true / self.count[label] * self.per_class
                if one is not None and weight / (weight + place - true) > self.rules.min_precision:
                    found.append(one)
        return [one for one in self.instances if all(one is not other for other in found)]

    def by_bucket(self, value: Callable[[str, str], float]) -> dict[str, dict[str, float]]:
        return {
            name: {
                bucket: value(name, bucket)
                for bucket in bins.labels
                if any(one.buckets[name] == bucket for one in self.instances)
            }
            for name, bins in self.rules.bins.items()
        }

    def members(self, instances: Sequence[Instance], name: str, bucket: str) -> int:
        return sum(one.buckets[name] == bucket for one in instances)

    def false_negative_rate(self) -> dict[str, dict[str, float]]:
        missed = [self.missed(tiou) for tiou in self.rules.tious]
        return self.by_bucket(
            lambda name, bucket: fmean(
                self.members(lost, name, bucket) / self.members(self.instances, name, bucket)
                for lost in missed
            )
        )

    def bucket_share(self) -> dict[str, dict[str, float]]:
        def share(name: str, bucket: str) -> float:
            anywhere = sum(one.buckets[name] != "" for one in self.instances)
            return self.members(self.instances, name, bucket) / anywhere

        return self.by_bucket(share)

    def sensitivity(self) -> dict[str, dict[str, float]]:
        found = {
            label: [self.matched(self.all[label], label, tiou) for tiou in self.rules.tious]
            for label in self.classes
        }

        def value(name: str, bucket: str) -> float:
            means = []
            for label in self.classes:
                positives = self.members([o for o in self.instances if o.label == label], name, bucket)
                if not positives:
                    continue
                kept = [
                    place
                    for place in range(len(found[label][0]))
                    if all(
                        pairs[place][1] is None or pairs[place][1].buckets[name] == bucket
                        for pairs in found[label]
                    )
                ]
                means.append(
                    fmean(
                        self.ap([pairs[place][1] is not None for place in kept], positives)
                        for pairs in found[label]
                    )
                )
            return fmean(means)

        return self.by_bucket(value)


def assert_close(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, Mapping):
            assert_close(ours[key], value)
        else:
            assert ours[key] == pytest.approx(value, abs=1e-12), key


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "rules",
    [RULES, THUMOS14, RULES.model_copy(update={"tious": (0.05, 0.5)})],
    ids=["own", "thumos14", "below-the-least"],
)
def test_equals_the_naive_analysis(seed: int, ties: bool, rules: DetadRules) -> None:
    annotations, rows = crowded(seed, ties)
    ours, naive = diagnose(annotations, table_of(rows), rules), Naive(annotations, rows, rules)
    assert ours.num_ground_truth == len(naive.instances)
    assert ours.removed_ground_truth == 2
    assert ours.map_n == pytest.approx(naive.map_n(naive.best), abs=1e-12)
    assert ours.base_map_n == pytest.approx(naive.map_n(naive.all), abs=1e-12)
    assert_close(ours.gain, {name: naive.map_n(naive.best, name) - ours.map_n for name in ERRORS})
    counts = [
        Counter(naive.outcome(row, one, tiou) for row, one in naive.matched(naive.best[label], label, tiou))
        for tiou in rules.tious
        for label in naive.classes
    ]
    total = sum(counts, Counter())
    assert_close(ours.error_counts, {name: total[name] / len(rules.tious) for name in OUTCOMES})
    for group, expected in zip(ours.profile, naive.profile(), strict=True):
        assert (group is None) == (expected is None)
        if group is not None and expected is not None:
            assert_close(group, expected)
    assert_close(ours.false_negative_rate, naive.false_negative_rate())
    assert_close(ours.bucket_share, naive.bucket_share())
    assert_close(ours.sensitivity, naive.sensitivity())


def test_the_cases_are_not_empty() -> None:
    """What the comparison above relies on: every outcome happens, and the precision limit matters."""
    annotations, rows = crowded(0)
    ours = diagnose(annotations, table_of(rows), RULES)
    assert all(ours.error_counts.values())
    strict = RULES.model_copy(update={"min_precision": 0.5})
    assert diagnose(annotations, table_of(rows), strict).false_negative_rate != ours.false_negative_rate


# Two instances: class 0 at 0-4, class 1 at 10-14.
PAIR = {"a": [(0.0, 4.0, 0), (10.0, 14.0, 1)]}


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (("a", 0.0, 4.0, 0), "True Positive"),
        (("a", 0.0, 4.0, 1), "Wrong Label Err"),
        (("a", 10.0, 14.0, 0), "Wrong Label Err"),
        (("a", 3.0, 7.0, 0), "Localization Err"),  # tIoU 1/7
        (("a", 3.0, 7.0, 1), "Confusion Err"),
        (("a", 3.5, 7.5, 0), "Background Err"),  # 0.5/7.5 is below 0.1
        (("a", 16.0, 18.0, 0), "Background Err"),
        (("nowhere", 0.0, 4.0, 0), "Background Err"),
    ],
)
def test_what_a_detection_is(row: tuple[str, float, float, int], outcome: str) -> None:
    ours = diagnose(annotations_of(PAIR), table_of([(*row, 0.9)]))
    assert ours.error_counts == {name: float(name == outcome) for name in OUTCOMES}


def test_the_second_detection_of_an_instance_is_double() -> None:
    ours = diagnose(annotations_of(PAIR), table_of([("a", 0.0, 4.0, 0, 0.9), ("a", 0.0, 4.0, 0, 0.8)]))
    assert (ours.error_counts["True Positive"], ours.error_counts["Double Detection Err"]) == (1, 1)
    assert ours.map_n == 0.5 and ours.gain["Double Detection Err"] == 0


@pytest.mark.parametrize(("first", "error"), [(0, "Double Detection Err"), (1, "Wrong Label Err")])
def test_of_instances_overlapped_alike_the_first_of_the_video_names_the_error(first: int, error: str) -> None:
    rows = [(0.0, 4.0, first), (0.0, 4.0, 1 - first)]
    found = table_of([("a", 0.0, 4.0, 0, 0.9), ("a", 0.0, 4.0, 0, 0.8)])
    assert diagnose(annotations_of({"a": rows}), found).error_counts[error] == 1


def test_removing_an_error_gains_what_it_cost() -> None:
    """A false positive before a true one halves normalised precision, N = 1."""
    rows = [("a", 16.0, 18.0, 0, 0.9), ("a", 0.0, 4.0, 0, 0.8), ("a", 10.0, 14.0, 1, 0.7)]
    ours = diagnose(annotations_of(PAIR), table_of(rows))
    assert ours.map_n == 0.75
    assert ours.gain == {name: 0.25 * (name == "Background Err") for name in ERRORS}


def test_only_the_ten_best_for_each_instance_are_looked_at() -> None:
    wrong: list[Row] = [("a", 16.0, 18.0, 0, 0.9 - index / 100) for index in range(12)]
    ours = diagnose(annotations_of({"a": [(0.0, 4.0, 0)]}), table_of([*wrong, ("a", 0.0, 4.0, 0, 0.1)]))
    assert sum(ours.error_counts.values()) == 10
    assert ours.map_n == 0 and ours.base_map_n == pytest.approx(1 / 13)
    assert ours.sensitivity["length"] == {"S": pytest.approx(1 / 13)}
    assert ours.false_negative_rate["length"] == {"S": 0.0}


def test_no_detections() -> None:
    ours = diagnose(annotations_of(PAIR), table_of([]))
    assert (ours.map_n, ours.base_map_n) == (0, 0)
    assert set(ours.error_counts.values()) == set(ours.gain.values()) == {0.0}
    assert ours.profile == (None,) * 10
    assert ours.false_negative_rate["length"] == {"S": 1.0}
    assert ours.sensitivity["length"] == {"S": 0.0}


def test_a_value_outside_every_bin_is_in_no_bucket() -> None:
    rules = DetadRules(tious=(0.5,), bins={"length": Bins(edges=(0, 3, 5), labels=("S", "M"))})
    annotations = annotations_of({"a": [(0.0, 4.0, 0), (5.0, 6.0, 0), (7.0, 15.0, 0)]})
    ours = diagnose(annotations, table_of([("a", 7.0, 15.0, 0, 0.9), ("a", 0.0, 4.0, 0, 0.8)]), rules)
    assert ours.bucket_share == {"length": {"S": 0.5, "M": 0.5}}
    assert ours.false_negative_rate == {"length": {"S": 1.0, "M": 0.0}}
    assert ours.sensitivity == {"length": {"S": 0.0, "M": 1.0}}


def test_the_lowest_edge_belongs_to_the_first_bucket() -> None:
    rules = DetadRules(tious=(0.5,), bins={"length": Bins(edges=(1, 2, 5), labels=("S", "M"))})
    annotations = annotations_of({"a": [(0.0, 1.0, 0), (5.0, 7.0, 0), (8.0, 11.0, 0), (12.0, 12.5, 0)]})
    ours = diagnose(annotations, table_of([]), rules)
    assert ours.bucket_share == {"length": {"S": pytest.approx(2 / 3), "M": pytest.approx(1 / 3)}}


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ({}, "ground truth has no instance"),
        ({"a": []}, "ground truth has no instance"),
        ({"a": [(0.0, 30.0, 0), (5.0, 5.0, 0)]}, "no instance of the ground truth lasts"),
    ],
)
def test_nothing_to_analyse(videos: Mapping[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        diagnose(annotations_of(videos), table_of([("a", 0.0, 4.0, 0, 0.9)]))


def test_normalised_ap_by_hand() -> None:
    """Class 0: 2 instances, found at places 1 and 3; N = 4. Class 1: none found. Class 2: no instance."""
    true = np.array([True, False, True, False])
    label = np.array([0, 0, 0, 1])
    ap = normalised_ap(true, label, np.array([2, 6, 0]), per_class=4.0)
    assert ap[:2] == pytest.approx([0.5 * 1 + 0.5 * 4 / 5, 0])
    assert np.isnan(ap[2])


def test_activitynet_has_the_published_bins() -> None:
    assert ACTIVITYNET.tious == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
    assert ACTIVITYNET.bins["coverage"].edges == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ACTIVITYNET.bins["length"].edges == (0, 30, 60, 120, 180, INFINITY)
    assert ACTIVITYNET.bins["num-instances"].edges == (-1, 1, 4, 8, INFINITY)


def test_means_over_thresholds() -> None:
    """Counts, gains and rates at two thresholds are the means of those at each."""
    annotations, rows = crowded(1)
    both, *alone = (
        diagnose(annotations, table_of(rows), RULES.model_copy(update={"tious": tious}))
        for tious in ((0.3, 0.7), (0.3,), (0.7,))
    )

    def means(pick: Callable[[Detad], Mapping[str, float]]) -> dict[str, float]:
        return {key: fmean(pick(one)[key] for one in alone) for key in pick(both)}

    assert_close(both.error_counts, means(lambda one: one.error_counts))
    assert_close(both.gain, means(lambda one: one.gain))
    for name in RULES.bins:
        rates = means(lambda one, name=name: one.false_negative_rate[name])
        assert_close(both.false_negative_rate[name], rates)
