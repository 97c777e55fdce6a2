"""Post-processing against the released code's numbers."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pbd_ray.config import GridConfig, PostprocessConfig
from pbd_ray.data.annotations import Video
from pbd_ray.data.windows import Window, inference_windows
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.postprocess import decode, detections_of_video, suppress

pytestmark = pytest.mark.golden

TINY_GRID = GridConfig(window_frames=64, stride_frames=4, feature_steps=64)
SECONDS = 0.005 + 1e-4
"""The release rounds seconds to 2 decimals."""


def config_of(params: dict[str, Any]) -> PostprocessConfig:
    nms = "hard" if not params["use_soft_nms"] else {1: "linear", 2: "gaussian"}[params.get("method", 2)]
    return PostprocessConfig(
        nms=nms,
        sigma=params.get("sigma", 0.5),
        iou_threshold=params.get("iou_threshold", 0.0),
        min_score=params.get("min_score", 0.0),
        per_class=params["multiclass"],
        max_detections=params["max_seg_num"],
        voting_iou=params.get("voting_thresh", 0.0),
    )


@pytest.mark.parametrize("size", ["n1000", "n2000"])
@pytest.mark.parametrize("name", ["thumos", "thumos_top200", "anet", "agnostic_vote07", "hard_nms", "linear"])
def test_suppression(reference_file: Callable[[str], Path], name: str, size: str) -> None:
    golden = load_file(reference_file("softnms.safetensors"))
    params = json.loads(reference_file("softnms_params.json").read_text())[name]
    inputs = (golden[f"{size}.{key}"] for key in ("segs", "scores", "labels"))
    segments, scores, labels = suppress(*inputs, config_of(params))
    np.testing.assert_allclose(segments, golden[f"{size}.{name}.segs"], rtol=1e-5)
    np.testing.assert_allclose(scores, golden[f"{size}.{name}.scores"], rtol=1e-5)
    np.testing.assert_array_equal(labels, golden[f"{size}.{name}.labels"])


def tiny(
    shared: Path, seed: int
) -> tuple[DetectorOutput, tuple[Window, ...], dict[str, Any], dict[str, Any]]:
    """The tiny student's outputs, its two windows, the release's results and all its arrays."""
    arrays = load_file(shared / "reference" / f"tiny_seed{seed}_outputs.safetensors")
    with gzip.open(shared / "reference" / f"tiny_seed{seed}_results.json.gz", "rt") as file:
        results = json.load(file)

    def levels(key: str) -> torch.Tensor:
        return torch.cat([torch.from_numpy(arrays[f"student.{key}.{level}"]) for level in range(6)], dim=-1)

    output = DetectorOutput(
        logits=levels("cls_logits").transpose(1, 2),
        offsets=levels("reg").transpose(1, 2),
        mask=levels("mask").bool(),
        points=torch.from_numpy(arrays["student.points"]),
    )
    video = Video("video_A", "a.mp4", "test", 12.8, 30.0, 384, np.zeros((0, 2)), np.zeros(0, np.int32))
    windows = inference_windows(video, TINY_GRID)
    assert [w.start_frame for w in windows] == [meta["window_start_frame"] for meta in results["metas"]]
    return output, windows, results, arrays


def columns(rows: list[dict[str, Any]]) -> tuple[Any, Any, Any]:
    """(segments in seconds, labels, scores), all as the release rounded them."""
    segments = np.array([row["segment"] for row in rows])
    labels = np.array([int(row["label"][1:]) for row in rows])
    return segments, labels, np.array([row["score"] for row in rows])


@pytest.mark.parametrize("seed", [0, 1])
def test_decoding(shared: Path, seed: int) -> None:
    output, windows, results, arrays = tiny(shared, seed)
    config = PostprocessConfig(score_threshold=0)
    for row, everything in enumerate(decode(output, windows, config.model_copy(update={
        "pre_nms_top": 10**6,
    }))):  # fmt: skip
        segments, scores = arrays[f"student.proposals.{row}"], arrays[f"student.scores.{row}"]
        point, label = np.divmod(np.argsort(-scores.ravel(), kind="stable"), scores.shape[1])
        np.testing.assert_allclose(everything.scores, scores[point, label], rtol=1e-6)
        rounding = np.isclose(np.diff(everything.scores), 0, atol=1e-7).any()
        if not rounding:
            np.testing.assert_array_equal(everything.labels, label)
            np.testing.assert_allclose(everything.segments_steps, segments[point], rtol=1e-5, atol=1e-4)

    found = decode(output, windows, PostprocessConfig())
    segments, labels, scores = columns(results["student"]["pre_nms"])
    ours = np.concatenate([w.scores for w in found])
    assert len(ours) == len(scores) == 4000
    np.testing.assert_allclose(ours, scores, atol=5.1e-5)
    same = _distinct(ours)
    np.testing.assert_array_equal(np.concatenate([w.labels for w in found])[same], labels[same])
    seconds = np.concatenate([w.segments_seconds(TINY_GRID) for w in found])
    np.testing.assert_allclose(seconds[same], segments[same], atol=SECONDS)


@pytest.mark.parametrize("seed", [0, 1])
def test_pooling_and_suppression_of_a_video(shared: Path, seed: int) -> None:
    """On the release's own rounded proposals its result is ours; unrounded, as we do it, it is near."""
    output, windows, results, _ = tiny(shared, seed)
    config = config_of(results["post_processing"]["nms"])
    segments, labels, scores = columns(results["student"]["post_nms"])
    rounded = columns(results["student"]["pre_nms"])
    got_segments, got_scores, got_labels = suppress(rounded[0], rounded[2], rounded[1], config)
    assert len(got_scores) == len(scores)
    np.testing.assert_allclose(got_scores, scores, atol=5.1e-5)
    same = _distinct(scores)  # rounding makes thousands of ties, whose order the release leaves open
    assert same.sum() > 100
    np.testing.assert_array_equal(got_labels[same], labels[same])
    np.testing.assert_allclose(got_segments[same], segments[same], atol=SECONDS)

    table = detections_of_video([(output, windows)], TINY_GRID, config, 20)
    assert table.num_rows == len(scores)
    # Which of two proposals equal to 4 decimals goes first changes later decays: near, not equal.
    assert np.abs(table["score"].to_numpy() - scores).mean() < 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_suppression_on_the_grid(shared: Path, seed: int) -> None:
    output, windows, results, _ = tiny(shared, seed)
    config = config_of(results["post_processing"]["nms"])
    first = decode(output, windows, PostprocessConfig())[0]
    steps, decayed, kept = suppress(first.segments_steps, first.scores, first.labels, config)
    segments, labels, scores = columns(results["student_single_window0_nms_inside"])
    assert len(scores) == len(decayed)
    np.testing.assert_allclose(decayed, scores, atol=5.1e-5)
    same = _distinct(decayed)
    np.testing.assert_array_equal(kept[same], labels[same])
    np.testing.assert_allclose(np.clip(steps * 4 / 30, 0, 12.8)[same], segments[same], atol=SECONDS)


def test_suppression_is_quick() -> None:
    """8000 proposals: 6 ms (20 classes) and 70 ms (one) on one thread; the released kernel: 21 and 270.

    The bounds are ten times that, because machines are shared."""
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 300, 8000)
    segments = np.stack([start, start + rng.exponential(6, 8000)], axis=1)
    scores = rng.uniform(0, 1, 8000) ** 3
    for classes, bound in ((20, 0.2), (1, 2.7)):
        labels = rng.integers(0, classes, 8000)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            suppress(segments, scores, labels, PostprocessConfig())
            times.append(time.perf_counter() - began)
        assert min(times) < bound


def _distinct(scores: Any) -> Any:
    """Where a score is clearly apart from its neighbours, so that its place is not left to rounding."""
    gaps = np.abs(np.diff(scores)) > 1e-6
    return np.concatenate(([True], gaps)) & np.concatenate((gaps, [True]))
