"""DETAD against the original code's numbers on a published detector's detections of THUMOS14."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbd_ray.data.annotations import load_annotations, read_detections
from pbd_ray.metrics.detad import Detad, diagnose
from pbd_ray.report.detection_report import detad_json

pytestmark = pytest.mark.golden

EXACT = ("error_counts_top10G", "num_ground_truth")
CLOSE = ("mAP_N", "gain", "profile", "false_negative_rate", "bucket_share")


@pytest.fixture(scope="module")
def analysis(shared: Path) -> Detad:
    folder = shared / "data" / "thumos14"
    annotations = load_annotations(folder / "a2net_ground_truth.json")
    found = read_detections(folder / "a2net_predictions.json", annotations.classes).table
    began = time.perf_counter()
    ours = diagnose(annotations.subset("validation"), found)
    assert time.perf_counter() - began < 2  # it takes less than 0.1 s; the bound is loose as machines are
    return ours


@pytest.fixture(scope="module")
def expected(shared: Path) -> dict[str, Any]:
    text = (shared / "data" / "thumos14" / "expected.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def leaves(value: Any, prefix: str = "") -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key, child in value.items() for k, v in leaves(child, f"{prefix}/{key}").items()}


@pytest.mark.parametrize("key", EXACT)
def test_counts_are_exact(analysis: Detad, expected: dict[str, Any], key: str) -> None:
    assert detad_json(analysis)[key] == expected[key]


@pytest.mark.parametrize("key", CLOSE)
def test_rates_and_gains(analysis: Detad, expected: dict[str, Any], key: str) -> None:
    ours, theirs = leaves(detad_json(analysis)[key]), leaves(expected[key])
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[name] for name in theirs], list(theirs.values()), rtol=0, atol=1e-9)
