"""Decoding, suppression and voting against loops written here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pbd_ray.config import GridConfig, PostprocessConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA
from pbd_ray.data.windows import Window, grid_to_seconds
from pbd_ray.detector import postprocess
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.points import pyramid_points
from pbd_ray.detector.postprocess import (
    decode,
    detections_of_proposals,
    detections_of_video,
    suppress,
)

SLIDING = GridConfig(window_frames=32, stride_frames=2, feature_steps=16)
RESIZE = GridConfig(kind="resize", window_frames=32, feature_steps=16)
EPSILON = np.float32(1e-6)
KEEP_ALL = 10**6


def settings(**options: Any) -> PostprocessConfig:
    return PostprocessConfig(**{"max_detections": KEEP_ALL, **options})


def overlap(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    shared = max(np.float32(0), min(a[1], b[1]) - max(a[0], b[0]))
    return float(shared / ((a[1] - a[0] + EPSILON) + (b[1] - b[0] + EPSILON) - shared))


def naive_suppress(
    segments: npt.NDArray[np.float32], scores: npt.NDArray[np.float32], labels: Any, config: PostprocessConfig
) -> list[tuple[int, float]]:
    """(input index, score), one class and one pair at a time; nothing stops early."""
    kept: list[tuple[int, float]] = []
    for label in sorted(set(labels.tolist())) if config.per_class else [None]:
        left = {i: float(scores[i]) for i in range(len(scores)) if label is None or labels[i] == label}
        if config.nms == "hard" and config.min_score > 0:
            left = {i: score for i, score in left.items() if score > np.float32(config.min_score)}
        while left:
            best = max(left, key=lambda i: (left[i], -i))
            score = left.pop(best)
            if score < config.min_score:
                break
            kept.append((best, score))
            for i in list(left):
                shared = overlap(segments[best], segments[i])
                if config.nms == "gaussian":
                    left[i] *= math.exp(-(shared**2) / config.sigma)
                elif shared >= np.float32(config.iou_threshold):
                    if config.nms == "hard":
                        del left[i]
                    else:
                        left[i] *= 1 - shared
    kept.sort(key=lambda pair: -pair[1])
    return kept[: config.max_detections]


def proposals(
    seed: int, count: int, classes: int, span: float = 30.0, uneven: bool = False
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, span, count)
    segments = np.stack([start, start + rng.exponential(4, count)], axis=1).astype(np.float32)
    weights = np.arange(1, classes + 1) ** 3.0 if uneven else np.ones(classes)
    labels = rng.choice(classes, count, p=weights / weights.sum())
    return segments, rng.uniform(0, 1, count).astype(np.float32), labels


@pytest.mark.parametrize(
    "options",
    [
        {"nms": "gaussian"},
        {"nms": "gaussian", "sigma": 0.3, "min_score": 0.05},
        {"nms": "gaussian", "max_detections": 37},
        {"nms": "gaussian", "per_class": False},
        {"nms": "linear", "iou_threshold": 0.3, "sigma": 0.5},
        {"nms": "linear", "iou_threshold": 0.1, "min_score": 0.1, "per_class": False},
        {"nms": "hard", "iou_threshold": 0.5},
        {"nms": "hard", "iou_threshold": 0.2, "min_score": 0.3, "max_detections": 20},
        {"nms": "hard", "iou_threshold": 0.4, "per_class": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("count", "classes", "uneven"), [(250, 5, False), (300, 6, True), (90, 1, False)])
def test_suppression_equals_the_loop(options: dict[str, Any], count: int, classes: int, uneven: bool) -> None:
    segments, scores, labels = proposals(3, count, classes, uneven=uneven)
    config = settings(**options)
    expected = naive_suppress(segments, scores, labels, config)
    where, decayed, kept_labels = suppress(segments, scores, labels, config)
    index = [i for i, _ in expected]
    np.testing.assert_array_equal(where, segments[index])
    np.testing.assert_array_equal(kept_labels, labels[index])
    np.testing.assert_allclose(decayed, [score for _, score in expected], rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 10, 64, 65, 200, 700, 5000])
@pytest.mark.parametrize("per_class", [True, False])
def test_stopping_early_changes_nothing(limit: int, per_class: bool) -> None:
    segments, scores, labels = proposals(4, 1500, 7, span=200, uneven=True)
    everything = suppress(segments, scores, labels, settings(per_class=per_class))
    some = suppress(segments, scores, labels, settings(per_class=per_class, max_detections=limit))
    for whole, part in zip(everything, some, strict=True):
        np.testing.assert_array_equal(whole[:limit], part)


@pytest.mark.parametrize("span", [10.0, 60.0, 400.0])
@pytest.mark.parametrize("per_class", [True, False])
def test_visiting_only_what_overlaps_changes_nothing(
    span: float, per_class: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments, scores, labels = proposals(8, 1200, 5, span=span, uneven=True)
    config = settings(per_class=per_class)
    found = []
    for sparse in (postprocess.SPARSE, 0, 10**6):  # as it is, always, never (bar picks nothing overlaps)
        monkeypatch.setattr(postprocess, "SPARSE", sparse)
        found.append(suppress(segments, scores, labels, config))
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_equal_scores_go_by_input_index() -> None:
    apart = np.array([[i * 10.0, i * 10.0 + 1] for i in range(6)], dtype=np.float32)
    scores = np.full(6, 0.5, dtype=np.float32)
    labels = np.array([1, 0, 1, 0, 1, 0])
    for nms in ("gaussian", "linear", "hard"):
        where, _, kept = suppress(apart, scores, labels, settings(nms=nms, per_class=False))
        np.testing.assert_array_equal(where, apart)
        where, _, kept = suppress(apart, scores, labels, settings(nms=nms, max_detections=4))
        assert kept.tolist() == [0, 0, 0, 1]  # equal scores of several classes: by class
        np.testing.assert_array_equal(where, apart[[1, 3, 5, 0]])


@pytest.mark.parametrize("sigma", [0.7, 0.005])
def test_scores_that_decay_to_nothing_are_each_kept_once(sigma: float) -> None:
    """600 copies of a segment: scores pass through denormals to 0, yet nothing comes back or is lost."""
    copies = np.tile(np.array([[3.0, 9.0]]), (600, 1)) + np.arange(600)[:, None] * 1e-6
    scores = np.linspace(1, 0.5, 600)
    where, decayed, _ = suppress(copies, scores, np.zeros(600), settings(sigma=sigma))
    assert len(where) == 600 and len(np.unique(where[:, 0])) == 600
    assert decayed[-1] == 0 and (np.diff(decayed) <= 0).all()
    _, some, _ = suppress(copies, scores, np.zeros(600), settings(sigma=sigma, min_score=1e-3))
    assert 0 < len(some) < 30 and some.min() >= 1e-3


@pytest.mark.parametrize("nms", ["gaussian", "linear", "hard"])
def test_odd_inputs(nms: Any) -> None:
    nothing = suppress(np.zeros((0, 2)), np.zeros(0), np.zeros(0), settings(nms=nms))
    assert [x.shape for x in nothing] == [(0, 2), (0,), (0,)]
    points = np.array([[2.0, 2.0], [2.0, 2.0], [0.0, 5.0]])  # no duration
    where, decayed, _ = suppress(points, np.array([0.9, 0.8, 0.0]), np.zeros(3), settings(nms=nms))
    assert np.isfinite(decayed).all() and len(where) >= 2
    assert len(suppress(points, np.array([0.1] * 3), np.zeros(3), settings(nms=nms, min_score=0.2))[0]) == 0


@pytest.mark.parametrize("voting_iou", [0.3, 0.9])
def test_voting_averages_what_overlaps(voting_iou: float) -> None:
    segments, scores, labels = proposals(5, 200, 3, span=10)
    config = settings(per_class=False, nms="gaussian", max_detections=50, min_score=0.001)
    plain = suppress(segments, scores, labels, config)
    voted = suppress(segments, scores, labels, config.model_copy(update={"voting_iou": voting_iou}))
    np.testing.assert_array_equal(voted[1], plain[1])
    for mine, got in zip(plain[0], voted[0], strict=True):
        total, mean = 0.0, np.zeros(2)
        for other, score in zip(segments.astype(float), scores.astype(float), strict=True):
            shared = max(0.0, min(mine[1], other[1]) - max(mine[0], other[0]))
            if shared / ((mine[1] - mine[0]) + (other[1] - other[0]) - shared) >= voting_iou:
                total += score
                mean += score * other
        np.testing.assert_allclose(got, mean / total, rtol=1e-6)
    per_class = config.model_copy(update={"voting_iou": voting_iou, "per_class": True})
    unvoted = suppress(segments, scores, labels, per_class)
    assert {tuple(x) for x in unvoted[0]} <= {tuple(x) for x in segments.astype(float)}


def test_a_segment_nothing_can_vote_for_stays() -> None:
    segments = np.array([[4.0, 4.0], [5.0, 9.0], [20.0, 30.0]])
    config = settings(per_class=False, voting_iou=0.9)
    where, _, _ = suppress(segments, np.array([0.9, 0.8, 0.0]), np.zeros(3), config)
    np.testing.assert_array_equal(where, segments)


def window(video: str = "v", start_frame: int = 0, duration_seconds: float = 20.0) -> Window:
    return Window(
        video=video,
        frame_indices=np.zeros(32, np.int64),
        valid_steps=16,
        start_frame=start_frame,
        fps=10.0,
        duration_seconds=duration_seconds,
        segments=np.zeros((0, 2), np.float32),
        labels=np.zeros(0, np.int32),
    )


def output(seed: int, batch: int = 2, classes: int = 3, levels: int = 2) -> DetectorOutput:
    torch.manual_seed(seed)
    points = pyramid_points(16, tuple((0.0, 100.0) for _ in range(levels)))
    mask = torch.ones(batch, len(points), dtype=torch.bool)
    mask[-1, 10:16] = False
    return DetectorOutput(
        logits=torch.randn(batch, len(points), classes) * 3 - 3,
        offsets=torch.rand(batch, len(points), 2) * 4,
        mask=mask,
        points=points,
    )


@pytest.mark.parametrize(("threshold", "top"), [(0.001, 2000), (0.3, 2000), (0.05, 17), (0.0, 5), (0.999, 5)])
def test_decode_equals_the_loop(threshold: float, top: int) -> None:
    batch = output(1)
    windows = (window(), window(start_frame=150))
    config = PostprocessConfig(score_threshold=threshold, pre_nms_top=top)
    for row, got in enumerate(decode(batch, windows, config)):
        found = []
        for p, (t, _, _, stride) in enumerate(batch.points.tolist()):
            for label in range(3):
                score = float(torch.sigmoid(batch.logits[row, p, label]))
                if bool(batch.mask[row, p]) and score > threshold:
                    left, right = batch.offsets[row, p].tolist()
                    found.append((score, t - left * stride, t + right * stride, label))
        found.sort(key=lambda item: -item[0])
        found = found[:top]
        assert got.window is windows[row]
        assert got.labels.tolist() == [label for *_, label in found]
        np.testing.assert_allclose(got.scores, [score for score, *_ in found], rtol=1e-6)
        steps = np.array([[start, end] for _, start, end, _ in found]).reshape(-1, 2)
        np.testing.assert_allclose(got.segments_steps, steps, rtol=1e-5, atol=1e-5)
        # 32 frames of stride 2 on 16 steps: 4 video frames a step, 10 frames a second
        seconds = np.clip((steps * 4 + windows[row].start_frame) / 10, 0, 20)
        np.testing.assert_allclose(got.segments_seconds(SLIDING), seconds, atol=1e-5)


def test_equal_proposals_rank_by_point_then_class() -> None:
    batch = output(2, batch=1)
    level = DetectorOutput(torch.zeros_like(batch.logits), batch.offsets, batch.mask, batch.points)
    (got,) = decode(level, (window(),), PostprocessConfig(pre_nms_top=7))
    assert got.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    starts = (batch.points[:, 0] - batch.offsets[0, :, 0] * batch.points[:, 3])[[0, 0, 0, 1, 1, 1, 2]]
    np.testing.assert_allclose(got.segments_steps[:, 0], starts.numpy(), rtol=1e-6)


def test_half_precision_and_gradients_are_no_obstacle() -> None:
    batch = output(3, batch=1)
    half = DetectorOutput(
        batch.logits.bfloat16().requires_grad_(), batch.offsets.bfloat16(), batch.mask, batch.points
    )
    (got,) = decode(half, (window(),), PostprocessConfig())
    assert got.scores.dtype == got.segments_steps.dtype == np.float32


def test_windows_of_a_video_are_pooled_however_they_are_batched() -> None:
    both = output(4)
    windows = (window(), window(start_frame=60))
    config = PostprocessConfig(max_detections=40)
    parts = [
        (DetectorOutput(both.logits[i : i + 1], both.offsets[i : i + 1], both.mask[i : i + 1], both.points),
         windows[i : i + 1])
        for i in range(2)
    ]  # fmt: skip
    table = detections_of_video([(both, windows)], SLIDING, config, 3)
    assert table.equals(detections_of_video(iter(parts), SLIDING, config, 3))
    assert table.schema.equals(DETECTION_SCHEMA) and table.num_rows == 40
    assert set(table["video"].to_pylist()) == {"v"}
    assert (np.diff(table["score"].to_numpy()) <= 0).all()
    assert table["start"].to_numpy().min() >= 0 and table["end"].to_numpy().max() <= 20

    pooled = decode(both, windows, config)
    assert table.equals(detections_of_proposals(pooled, SLIDING, config))
    segments, scores, labels = suppress(
        np.concatenate([p.segments_seconds(SLIDING) for p in pooled]),
        np.concatenate([p.scores for p in pooled]),
        np.concatenate([p.labels for p in pooled]),
        config,
    )
    np.testing.assert_array_equal(np.stack([table["start"], table["end"]], axis=1), segments)
    np.testing.assert_array_equal(table["label"], labels)
    np.testing.assert_array_equal(table["score"], scores.astype(np.float64))


def test_a_resized_video_is_suppressed_on_the_grid() -> None:
    single = output(5, batch=1, classes=1)
    config = PostprocessConfig(
        score_threshold=0, per_class=False, min_score=0.001, max_detections=100, voting_iou=0.6
    )
    long = window(duration_seconds=300.0)
    table = detections_of_video([(single, (long,))], RESIZE, config, 1)
    (raw,) = decode(single, (long,), config)
    assert raw.segments_steps.min() < 0  # clipped only after suppression and voting
    segments, scores, _ = suppress(raw.segments_steps, raw.scores, raw.labels, config)
    seconds = np.clip(grid_to_seconds(segments, long, RESIZE), 0, 300)
    np.testing.assert_allclose(np.stack([table["start"], table["end"]], axis=1), seconds)
    np.testing.assert_array_equal(table["score"], scores.astype(np.float64))


def test_no_window_no_detection() -> None:
    table = detections_of_video([], SLIDING, PostprocessConfig(), 3)
    assert table.num_rows == 0 and table.schema.equals(DETECTION_SCHEMA)
    silent = output(6)
    silent = DetectorOutput(silent.logits - 100, silent.offsets, silent.mask, silent.points)
    table = detections_of_video([(silent, (window(), window()))], SLIDING, PostprocessConfig(), 3)
    assert table.num_rows == 0 and table.schema.equals(DETECTION_SCHEMA)
