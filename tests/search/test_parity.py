"""How far an export is from its bundle."""

from __future__ import annotations

import math
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from pbd_ray.config import GridConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.export.format import Tolerance
from pbd_ray.search.parity import DetectionParity, Parity, compare_on_random_pixels, partner_differences

Row = tuple[str, float, float, int, float]
FIRST: list[Row] = [("v", 1.0, 2.0, 0, 0.9), ("v", 5.0, 7.0, 0, 0.5), ("v", 5.0, 7.0, 1, 0.5)]


def table(rows: list[Row]) -> pa.Table:
    return pa.table(list(zip(*rows, strict=True)) if rows else [[]] * 5, schema=DETECTION_SCHEMA)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        pytest.param(FIRST, (0.0, 0.0), id="the same"),
        pytest.param(FIRST[::-1], (0.0, 0.0), id="another order"),
        pytest.param([("v", 1.0, 2.25, 0, 0.9), *FIRST[1:]], (0.25, 0.0), id="an end"),
        pytest.param([*FIRST[:2], ("v", 4.5, 7.0, 1, 0.375)], (0.5, 0.125), id="a start and a score"),
        pytest.param([*FIRST[:2], ("w", *FIRST[2][1:])], (0.0, 0.0), id="another video has no partner"),
        pytest.param(FIRST[:1], (0.0, 0.0), id="fewer"),
        pytest.param([], (0.0, 0.0), id="none"),
    ],
)
def test_partners(theirs: list[Row], expected: tuple[float, float]) -> None:
    assert partner_differences(table(FIRST), table(theirs)) == expected


def test_a_partner_is_taken_once() -> None:
    twins: list[Row] = [("v", 0.0, 1.0, 0, 0.5), ("v", 0.0, 1.0, 0, 0.5)]
    apart: list[Row] = [("v", 0.0, 1.0, 0, 0.5), ("v", 3.0, 4.0, 0, 0.5)]
    assert partner_differences(table(twins), table(apart)) == (3.0, 0.0)


WITHIN = Parity(
    "videos", 3, 1e-4, 1e-4, DetectionParity(1, 2, 2, 9.0, 1.0, {0.5: 0.5, 0.7: 0.25}, {0.5: 0.5, 0.7: 0.25})
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"detections": None}, None),
        ({"logits": 2e-3}, "logits differ by up to 0.002 from the bundle's, over 0.001"),
        ({"offsets": 2e-3}, "offsets differ by up to 0.002"),
        ({"logits": math.nan}, "logits differ by up to nan"),
        ({"offsets": math.inf}, "offsets differ by up to inf"),
        ({"export_map": {0.5: 0.5, 0.7: 0.5}}, "mAP differ by up to 0.25 from the bundle's, over 0.001"),
    ],
)
def test_excess(change: dict[str, object], message: str | None) -> None:
    """Detections alone decide nothing: equal scores may come in any order."""
    parity = WITHIN
    if "export_map" in change:
        assert parity.detections is not None
        change = {"detections": replace(parity.detections, **change)}
    found = replace(parity, **change).excess(Tolerance(1e-3, 1e-3, 1e-3, ""))
    assert found is None if message is None else found is not None and found.startswith(message)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param((0, 0, 0.0), (0.0, 0.0), id="none"),
        pytest.param((0, 2, 0.5), (0.5, 0.0), id="a logit"),
        pytest.param((1, 7, math.nan), (math.nan, 0.0), id="NaN of the second window"),
        pytest.param((1, 9, 0.5), (0.0, 0.0), id="after the end of the video"),
    ],
)
def test_outputs_are_compared_where_there_is_video(
    change: tuple[int, int, float], expected: tuple[float, float]
) -> None:
    grid = GridConfig(window_frames=16, feature_steps=16, crop_pixels=16)

    def ours(frames: Tensor, mask: Tensor) -> DetectorOutput:
        assert frames.shape == (2, 3, 16, 16, 16) and frames.float().std() > 60
        return DetectorOutput(torch.zeros(2, 16, 1), torch.zeros(2, 16, 2), mask, torch.zeros(16, 4))

    def theirs(frames: Tensor, mask: Tensor) -> DetectorOutput:
        output = ours(frames, mask)
        window, point, difference = change
        output.logits[window, point] -= difference
        return output

    (parity,) = compare_on_random_pixels(ours, [theirs], grid)
    assert (parity.logits, parity.offsets) == pytest.approx(expected, nan_ok=True)
    assert parity.windows == 2
