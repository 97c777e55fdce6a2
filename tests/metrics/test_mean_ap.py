"""mAP against a loop-by-loop evaluator written here, and the corner cases by hand."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.data.annotations import DETECTION_SCHEMA, GROUND_TRUTH_SCHEMA
from pbd_ray.metrics import mean_ap
from pbd_ray.metrics.mean_ap import (
    MetricError,
    match_detections,
    mean_ap_of,
    mean_average_precision,
    prepare_ground_truth,
)

TIOUS = (0.3, 0.5, 0.7)


def ground_truth_table(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    """Rows (video, start, end, label)."""
    return pa.table(list(map(list, zip(*rows, strict=True))) or [[]] * 4, schema=GROUND_TRUTH_SCHEMA)


def detection_table(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    """Rows (video, start, end, label, score)."""
    return pa.table(list(map(list, zip(*rows, strict=True))) or [[]] * 5, schema=DETECTION_SCHEMA)


def random_rows(
    seed: int, videos: int = 6, classes: int = 3, instances: int = 4, detections: int = 25, ties: bool = False
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Crowded rows: many detections overlap several instances."""
    rng = np.random.default_rng(seed)

    def segment() -> tuple[float, float]:
        start = rng.uniform(0, 20)
        return float(start), float(start + rng.uniform(1, 8))

    truth, found = [], []
    for video in range(videos):
        for _ in range(instances):
            truth.append((f"v{video}", *segment(), int(rng.integers(classes))))
        for _ in range(detections):
            score = rng.integers(5) / 5 if ties else rng.uniform()
            found.append((f"v{video}", *segment(), int(rng.integers(classes)), float(score)))
    return truth, found


def naive_ap(
    truth: list[tuple[Any, ...]], found: list[tuple[Any, ...]], tiou: float, label: int
) -> float | None:
    """The official definition, one detection and one instance at a time."""
    left: list[tuple[Any, ...]] = []
    for row in truth:
        same = (o for o in left if o[0] == row[0] and o[3] == row[3])
        duplicate = any(abs(o[1] - row[1]) <= 1e-3 and abs(o[2] - row[2]) <= 1e-3 for o in same)
        if row[2] - row[1] > 0 and not duplicate:
            left.append(row)
    positives = [row for row in left if row[3] == label]
    if not positives:
        return None
    mine = [row for row in found if row[3] == label]
    order = np.argsort([row[4] for row in mine], kind="stable")[::-1] if mine else []
    taken: set[int] = set()
    hits = []
    for index in order:
        video, start, end, *_ = mine[index]
        best, best_overlap = None, 0.0
        for place, (other, begin, stop, _) in enumerate(positives):
            if other != video or place in taken:
                continue
            shared = max(0.0, min(end, stop) - max(start, begin))
            overlap = shared / max((stop - begin) + (end - start) - shared, 1e-8)
            if overlap >= tiou and overlap >= best_overlap:
                best, best_overlap = place, overlap
        hits.append(best is not None)
        if best is not None:
            taken.add(best)
    recall, precision = [0.0], [0.0]
    for count in range(1, len(hits) + 1):
        recall.append(sum(hits[:count]) / len(positives))
        precision.append(sum(hits[:count]) / count)
    area = 0.0
    for place in range(1, len(recall)):
        area += (recall[place] - recall[place - 1]) * max(precision[place:])
    return area


def naive_map(truth: list[tuple[Any, ...]], found: list[tuple[Any, ...]], tiou: float, classes: int) -> float:
    values = [naive_ap(truth, found, tiou, label) for label in range(classes)]
    return float(np.mean([value for value in values if value is not None]))


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 0},
        {"seed": 1, "videos": 1, "classes": 1, "instances": 12, "detections": 80},
        {"seed": 2, "classes": 8, "instances": 2},
        {"seed": 3, "ties": True},
        {"seed": 4, "videos": 3, "classes": 1, "instances": 20, "detections": 60, "ties": True},
        {"seed": 5, "detections": 0},
    ],
)
def test_equals_the_definition(options: dict[str, Any]) -> None:
    truth, found = random_rows(**options)
    classes = options.get("classes", 3)
    scored = mean_average_precision(ground_truth_table(truth), detection_table(found), TIOUS, classes)
    for row, tiou in enumerate(TIOUS):
        assert scored.map[tiou] == pytest.approx(naive_map(truth, found, tiou, classes), abs=1e-12)
        for label in range(classes):
            expected = naive_ap(truth, found, tiou, label)
            assert scored.ap[row, label] == pytest.approx(
                np.nan if expected is None else expected, abs=1e-12, nan_ok=True
            )
    assert scored.average_map == pytest.approx(np.mean([scored.map[tiou] for tiou in TIOUS]))
    assert scored.at("average") == scored.average_map and scored.at(0.5) == scored.map[0.5]


def test_duplicate_and_empty_instances_are_left_out() -> None:
    truth = [
        ("a", 1.0, 5.0, 0),
        ("a", 1.0005, 5.0005, 0),  # the first again
        ("a", 1.0012, 5.0, 0),  # near the removed one only, so it stays
        ("a", 1.0, 5.0, 1),  # another class
        ("b", 1.0, 5.0, 0),  # another video
        ("b", 7.0, 7.0, 0),  # lasts no time
        ("b", 9.0, 8.0, 2),  # ends before it starts: class 2 has nothing left
    ]
    found = [
        ("a", 1.0, 5.0, 0, 0.9),
        ("b", 7.0, 7.0, 0, 0.8),
        ("b", 1.0, 5.0, 0, 0.7),
        ("a", 1.0, 5.0, 1, 0.6),
    ]
    scored = mean_average_precision(ground_truth_table(truth), detection_table(found), TIOUS, 3)
    assert scored.removed_ground_truth == 3
    assert scored.absent_classes == 1
    assert scored.ap[0].tolist() == pytest.approx([(1 + 2 / 3) / 3, 1.0, np.nan], nan_ok=True)
    for tiou in TIOUS:
        assert scored.map[tiou] == pytest.approx(naive_map(truth, found, tiou, 3))


WARNED = [
    ("nothing to say", [("a", 0.0, 4.0, 0)], [("a", 0.0, 4.0, 0, 0.9)], 1, []),
    ("absent", [("a", 0.0, 4.0, 1)],
     [("a", 0.0, 4.0, 1, 0.5), ("a", 0.0, 4.0, 0, 0.9), ("a", 1.0, 4.0, 4, 0.9)], 5,
     ["mAP: 4 of 5 classes have no instance in the ground truth and leave the mean, with 2 detections"]),
    ("empty", [("a", 0.0, 4.0, 1), ("a", 0.0, 4.0, 0)], [], 2,
     ["mAP: no detections at all: 2 of 2 classes with instances have an AP of 0"]),
    ("undetected", [("a", 0.0, 4.0, 1), ("a", 0.0, 4.0, 0)], [("a", 0.0, 4.0, 1, 0.5)], 2,
     ["mAP: classes without a detection: 1 of 2 classes with instances have an AP of 0"]),
    ("removed", [("a", 0.0, 4.0, 0), ("a", 0.0005, 4.0, 0), ("a", 2.0, 2.0, 0), ("a", 3.0, 2.0, 0)],
     [("a", 0.0, 4.0, 0, 0.9)], 1,
     ["mAP: 3 ground-truth instances left out: 2 without a duration, 1 within 0.001 s of an earlier one"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("truth", "found", "classes", "expected"), [case[1:] for case in WARNED], ids=[case[0] for case in WARNED]
)
def test_what_the_number_hides_is_counted_once(
    truth: Any, found: Any, classes: int, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    mean_ap._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            scored = mean_average_precision(ground_truth_table(truth), detection_table(found), TIOUS, classes)
    assert [record.getMessage() for record in caplog.records] == expected
    present = {row[3] for row in truth if row[2] > row[1]}
    assert scored.undetected_classes == len(present - {row[3] for row in found})


PROGRAM = """
import sys
from pbd_ray.data.annotations import load_annotations, read_detections
from pbd_ray.metrics.mean_ap import mean_average_precision
annotations = load_annotations(sys.argv[1])
found = read_detections(sys.argv[2], annotations.classes).table
print(mean_average_precision(annotations.ground_truth(), found, (0.5,), len(annotations.classes)).average_map)
"""


def test_a_user_sees_the_warnings_of_files_and_of_the_metric(tmp_path: Path) -> None:
    """In a process that sets up no logging, as our jobs do not: on stderr, a line each."""
    instances = [
        {"label": label, "segment": segment}
        for label, segment in (("x", [1, 2]), ("x", [3, 3]), ("y", [4, 5]))
    ]
    entry = {"subset": "validation", "duration": 9.0, "annotations": instances}
    found = [{"label": "x", "segment": [1, 2], "score": 0.5}, {"label": "z", "segment": [1, 2], "score": 0.5}]
    paths = [tmp_path / "truth.json", tmp_path / "found.json"]
    paths[0].write_text(json.dumps({"database": {"a": entry}}))
    paths[1].write_text(json.dumps({"results": {"a": found}}))
    command = [sys.executable, "-c", PROGRAM, *map(str, paths)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "0.5\n"
    assert done.stderr.splitlines() == [
        f"{paths[1]}: 1 detections of unknown labels left out",
        "mAP: 1 ground-truth instances left out: 1 without a duration, 0 within 0.001 s of an earlier one",
        "mAP: classes without a detection: 1 of 2 classes with instances have an AP of 0",
    ]


def test_classes_without_ground_truth_leave_the_mean() -> None:
    truth, found = [("a", 0.0, 4.0, 1)], [("a", 0.0, 4.0, 1, 0.5), ("a", 0.0, 4.0, 0, 0.9)]
    scored = mean_average_precision(ground_truth_table(truth), detection_table(found), TIOUS, 5)
    assert scored.map == dict.fromkeys(TIOUS, 1.0)
    assert scored.absent_classes == 4


def test_detections_of_other_videos_are_false_unless_restricted() -> None:
    truth = ground_truth_table([("a", 0.0, 4.0, 0), ("b", 0.0, 4.0, 0)])
    found = detection_table([("x", 0.0, 4.0, 0, 0.9), ("b", 0.0, 1.0, 0, 0.8), ("a", 0.0, 4.0, 0, 0.7)])
    assert mean_average_precision(truth, found, (0.5,), 1).map[0.5] == pytest.approx(0.5 / 3)
    assert mean_average_precision(truth, found, (0.5,), 1, videos=("a", "b")).map[0.5] == pytest.approx(0.25)
    assert mean_average_precision(truth, found, (0.5,), 1, videos=("a",)).map[0.5] == 1.0


def test_no_detection_scores_zero() -> None:
    scored = mean_average_precision(
        ground_truth_table([("a", 0.0, 4.0, 0)]), DETECTION_SCHEMA.empty_table(), TIOUS, 2
    )
    assert scored.map == dict.fromkeys(TIOUS, 0.0) and scored.average_map == 0.0


def test_prepared_ground_truth_scores_many_tables() -> None:
    truth, _ = random_rows(7)
    prepared = prepare_ground_truth(ground_truth_table(truth), 3)
    for seed in range(3):
        found = random_rows(seed)[1]
        again = mean_average_precision(prepared, detection_table(found), TIOUS, 3)
        once = mean_average_precision(ground_truth_table(truth), detection_table(found), TIOUS, 3)
        np.testing.assert_array_equal(again.ap, once.ap)


def test_row_order_and_chunked_columns_do_not_matter() -> None:
    truth, found = random_rows(8)
    whole = mean_average_precision(ground_truth_table(truth), detection_table(found), TIOUS, 3)
    shuffled = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    pieces = pa.concat_tables([detection_table(shuffled[:40]), detection_table(shuffled[40:])])
    np.testing.assert_array_equal(
        mean_average_precision(ground_truth_table(truth), pieces, TIOUS, 3).ap, whole.ap
    )


def test_matches_depend_on_their_own_video_only() -> None:
    truth, found = random_rows(9)
    everything = match_detections(
        prepare_ground_truth(ground_truth_table(truth), 3), detection_table(found), TIOUS
    )
    hits = np.zeros((len(TIOUS), len(found)), dtype=bool)
    hits[:, everything.rows] = everything.true_positive
    for video in {row[0] for row in found}:
        mine = [i for i, row in enumerate(found) if row[0] == video]
        alone = match_detections(
            prepare_ground_truth(ground_truth_table([row for row in truth if row[0] == video]), 3),
            detection_table([found[i] for i in mine]),
            TIOUS,
        )
        expected = np.zeros((len(TIOUS), len(mine)), dtype=bool)
        expected[:, alone.rows] = alone.true_positive
        np.testing.assert_array_equal(hits[:, mine], expected)


@pytest.mark.parametrize(
    ("truth", "found", "tious", "message"),
    [
        ([("a", 0.0, 1.0, 2)], [], TIOUS, r"ground truth: label 2 is not in 0\.\.1"),
        ([("a", 0.0, 1.0, 0)], [("a", 0.0, 1.0, -1, 0.5)], TIOUS, r"detections: label -1 is not in 0\.\.1"),
        ([("a", 0.0, 1.0, 0)], [("a", 0.0, 1.0, 0, np.nan)], TIOUS, "detections: score nan is not finite"),
        ([("a", 0.0, np.inf, 0)], [], TIOUS, r"ground truth: segment \[0.0, inf\] is not finite"),
        ([("a", 1.0, 1.0, 0)], [], TIOUS, "ground truth has no instance"),
        ([("a", 0.0, 1.0, 0)], [], (), "tIoU thresholds"),
        ([("a", 0.0, 1.0, 0)], [], (0.0,), "tIoU thresholds"),
    ],
)
def test_wrong_tables_are_refused(truth: Any, found: Any, tious: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message) as refusal:
        mean_average_precision(ground_truth_table(truth), detection_table(found), tious, 2)
    assert "\n" not in str(refusal.value)


def test_mean_ap_of_is_the_last_step() -> None:
    truth, found = random_rows(10)
    matches = match_detections(
        prepare_ground_truth(ground_truth_table(truth), 3), detection_table(found), TIOUS
    )
    direct = mean_average_precision(ground_truth_table(truth), detection_table(found), TIOUS, 3)
    np.testing.assert_array_equal(mean_ap_of(matches).ap, direct.ap)
