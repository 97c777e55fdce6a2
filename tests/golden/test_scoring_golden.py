"""Fused scoring against the release's candidates, from frames to detections.

The release rounds seconds to 2 decimals and scores to 4 before suppression; where detections are compared
to its own, so does this test. Ours rounds nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.scoring import fused_outputs
from pbd_ray.config import PostprocessConfig
from pbd_ray.data.annotations import Video
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.data.windows import inference_windows
from pbd_ray.detector.postprocess import decode, suppress

pytestmark = pytest.mark.golden

SCORE = 5.1e-5
"""Half of the last decimal of a score."""
FLIPPED = 1.5e-4
"""A score whose fifth decimal is near 5 may round the other way."""


def window_batch(reference: Any) -> WindowBatch:
    inputs = reference.tensors("inputs")
    segments, labels = reference.truth()
    video = Video("video_A", "a.mp4", "test", 12.8, 30.0, 384, np.zeros((0, 2)), np.zeros(0, np.int32))
    windows = inference_windows(video, reference.config.grid)
    return WindowBatch(inputs["frames"][:, 0], inputs["masks"].bool(), segments, labels, windows)


def test_candidates_of_the_student(reference: Any) -> None:
    """Scores of every point, then detections: every candidate and the undropped student in one pass."""
    detector, batch = reference.detector("student"), window_batch(reference)
    arrays, results = reference.tensors("outputs"), reference.results()
    with torch.inference_mode():
        fused = dict(fused_outputs(detector, batch, reference.kept["student"]))
    assert list(fused) == [*reference.kept["student"], UNDROPPED]
    for block, output in fused.items():
        key = "student" if block == UNDROPPED else f"cand_2_{block}"
        for i in range(2):
            ours = output.logits[i][output.mask[i]].sigmoid()
            torch.testing.assert_close(ours, arrays[f"{key}.scores.{i}"], rtol=1e-4, atol=1e-5)
        expected = results[key].get("post_nms_top100") or results[key]["post_nms"][:100]
        compare_detections(output, batch, reference.config.grid, expected)


def compare_detections(output: Any, batch: WindowBatch, grid: Any, expected: list[dict[str, Any]]) -> None:
    config = PostprocessConfig()
    found = decode(output, batch.windows, config)
    assert sum(len(window.scores) for window in found) == 4000
    segments = np.round(np.concatenate([window.segments_seconds(grid) for window in found]), 2)
    scores = np.round(np.concatenate([window.scores for window in found]), 4)
    kept, decayed, labels = suppress(segments, scores, np.concatenate([w.labels for w in found]), config)
    assert len(decayed) == 2000
    theirs = np.array([row["score"] for row in expected])
    np.testing.assert_allclose(decayed[: len(theirs)], theirs, rtol=0, atol=FLIPPED)
    # What is apart from its neighbours by more than rounding stands in the same place.
    gaps = np.diff(theirs) < -2 * FLIPPED
    apart = np.concatenate(([True], gaps)) & np.concatenate((gaps, [False]))
    assert apart.sum() > len(theirs) / 2
    names = np.array([int(row["label"][1:]) for row in expected])
    np.testing.assert_array_equal(labels[: len(theirs)][apart], names[apart])
    where = np.array([row["segment"] for row in expected])
    np.testing.assert_allclose(kept[: len(theirs)][apart], where[apart], rtol=0, atol=0.0101)
