"""What the evaluation's figures show; the drawing is only asked for a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.data.annotations import DETECTION_SCHEMA, GROUND_TRUTH_SCHEMA
from pbd_ray.metrics.detad import ERRORS, OUTCOMES, Detad
from pbd_ray.metrics.detad_rules import THUMOS14
from pbd_ray.metrics.mean_ap import Matches, match_detections, mean_ap_of, prepare_ground_truth
from pbd_ray.report.detection_figures import (
    Bar,
    bars_info,
    draw_false_negatives,
    draw_false_positives,
    draw_precision_recall,
    draw_sensitivity,
    precision_recall_info,
    profile_info,
    spread_info,
)

SHARES = dict.fromkeys(OUTCOMES, 1 / 6)
DETAD = Detad(
    rules=THUMOS14,
    num_ground_truth=4,
    removed_ground_truth=0,
    map_n=0.4,
    gain=dict.fromkeys(ERRORS, 0.01),
    error_counts=dict.fromkeys(OUTCOMES, 2.0),
    profile=(SHARES, SHARES, *[None] * 8),
    false_negative_rate={"length": {"S": 0.5, "XL": 0.0}, "num-instances": {"M": 0.25}},
    bucket_share={"length": {"S": 0.75, "XL": 0.25}, "num-instances": {"M": 1.0}},
    base_map_n=0.5,
    sensitivity={"length": {"S": 0.25, "XL": 0.6}, "num-instances": {"M": 0.5}},
)
NOTHING = replace(
    DETAD, map_n=0.0, gain=dict.fromkeys(ERRORS, 0.0), profile=(None,) * 10, base_map_n=0.0, sensitivity={}
)


def matches_of(instances: Sequence[tuple[float, int]], found: Sequence[tuple[float, int, float]]) -> Matches:
    """One video; instances (start, label) and detections (start, label, score), each one second long."""
    truth = [("v", start, start + 1, label) for start, label in instances]
    rows = [("v", start, start + 1, label, score) for start, label, score in found]
    ground_truth = pa.table(list(map(list, zip(*truth, strict=True))), schema=GROUND_TRUTH_SCHEMA)
    detections = pa.table(list(map(list, zip(*rows, strict=True))) or [[]] * 5, schema=DETECTION_SCHEMA)
    return match_detections(prepare_ground_truth(ground_truth, 3), detections, (0.5, 0.9))


def test_precision_recall_by_hand() -> None:
    """Class 0 finds 2 of 4 at places 1 and 3, class 1 finds 1 of 1 at place 2; class 2 is not there."""
    instances = [(0, 0), (10, 0), (20, 0), (30, 0), (40, 1)]
    found = [(0.0, 0, 0.9), (50.0, 0, 0.8), (10.3, 0, 0.7), (60.0, 1, 0.9), (40.0, 1, 0.8)]
    recalls = np.array([0, 0.25, 0.26, 0.5, 0.51, 1])
    loose, tight = precision_recall_info(matches_of(instances, found), recalls)
    assert loose.tiou == 0.5 and tight.tiou == 0.9
    first = np.array([1, 1, 2 / 3, 2 / 3, 0, 0])
    assert loose.precision == pytest.approx((first + 0.5) / 2)
    # at 0.9 the detection at 10.3 is a miss
    assert tight.precision == pytest.approx((np.array([1, 1, 0, 0, 0, 0]) + 0.5) / 2)


def test_the_area_under_a_curve_is_the_map() -> None:
    rng = np.random.default_rng(0)
    instances = [(float(10 * index), int(rng.integers(2))) for index in range(40)]
    found = [
        (start + float(rng.normal(0, 0.3)), label if rng.random() < 0.8 else 1 - label, float(rng.random()))
        for start, label in instances * 2
    ]
    matches = matches_of(instances, found)
    means = mean_ap_of(matches).map
    for curve in precision_recall_info(matches, np.linspace(0, 1, 10001)):
        assert 0.05 < means[curve.tiou] < 0.99
        assert curve.precision[1:].mean() == pytest.approx(means[curve.tiou], abs=1e-3)


def test_no_detections_are_a_flat_line() -> None:
    (curve, _) = precision_recall_info(matches_of([(0, 0)], []))
    assert not curve.precision.any() and len(curve.recall) == 101


def test_groups_without_detections_are_not_drawn() -> None:
    assert profile_info(DETAD) == (("1G", SHARES), ("2G", SHARES))


def test_bars_stand_in_the_order_of_the_rules() -> None:
    assert bars_info(DETAD.sensitivity, DETAD.bucket_share) == (
        Bar("length", "S", 0.25, 0.75),
        Bar("length", "XL", 0.6, 0.25),
        Bar("num-instances", "M", 0.5, 1.0),
    )


def test_spread_is_relative_to_all_instances() -> None:
    assert spread_info(DETAD) == (("length", 0.5, 1.2), ("num-instances", 1.0, 1.0))
    assert spread_info(NOTHING) == ()


@pytest.mark.parametrize("detad", [DETAD, NOTHING], ids=["some", "none"])
@pytest.mark.parametrize("draw", [draw_false_positives, draw_false_negatives, draw_sensitivity])
def test_figures_are_pictures(draw: object, detad: Detad) -> None:
    assert callable(draw)
    assert draw(detad).startswith(b"\x89PNG")


def test_precision_recall_is_a_picture() -> None:
    assert draw_precision_recall(precision_recall_info(matches_of([(0, 0)], []))).startswith(b"\x89PNG")
