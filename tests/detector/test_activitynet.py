"""The ActivityNet path of the shipped recipe, from fixtures made by hand (design, section 2).

The golden numbers are of the THUMOS14 path only; here the rules are written out as loops.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from pbd_ray.config import DetectorConfig, load_recipe
from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations, Video, split
from pbd_ray.data.video_classes import VideoClasses
from pbd_ray.data.windows import grid_to_seconds, inference_windows, training_window
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.points import pyramid_points
from pbd_ray.detector.postprocess import detections_of_video
from pbd_ray.metrics.mean_ap import mean_average_precision

EXPERIMENT = load_recipe("activitynet_videomae_s").experiment
CONFIG: DetectorConfig = EXPERIMENT.detector
STEPS = 192


def video(
    id_: str = "v",
    frames: int = 3000,
    seconds: float = 100.0,
    segments: object = (),
    subset: str = "training",
) -> Video:
    where = np.array(segments, np.float64).reshape(-1, 2)
    labels = np.zeros(len(where), np.int32)
    return Video(id_, f"{id_}.mp4", subset, seconds, frames / seconds, frames, where, labels)


def test_the_recipe_says_what_the_design_does() -> None:
    grid, head, post = CONFIG.grid, CONFIG.head, CONFIG.postprocess
    assert (grid.kind, grid.window_frames, grid.feature_steps) == ("resize", 768, STEPS)
    assert (head.channels, head.position_table, head.label_smoothing) == (256, True, 0.1)
    assert (head.boundary_weight, head.normalizer_init) == (2.0, 200.0)
    assert (post.score_threshold, post.min_score, post.max_detections) == (0.0, 0.001, 100)
    assert (post.per_class, post.voting_iou, post.external_top_classes) == (False, 0.9, 2)
    assert (EXPERIMENT.data.class_agnostic, EXPERIMENT.data.min_instance_fraction) == (True, 0.01)


@pytest.mark.parametrize("frames", [1, 5, 767, 768, 769, 2304, 3584, 5120, 7168, 9728, 17981])
def test_frames_are_the_centres_of_768_equal_bins(frames: int) -> None:
    (window,) = inference_windows(video(frames=frames), CONFIG.grid)
    size = frames / 768
    # Stepped as OpenTAD does it: at 3584 and more frames other ways round half-way centres otherwise.
    centres = np.arange(size / 2 - 0.5, frames + size / 2 - 0.5, size)[:768]
    assert window.frame_indices.tolist() == np.clip(centres, 0, frames - 1).round().astype(int).tolist()
    assert (window.valid_steps, window.start_frame) == (STEPS, 0)
    exact = (np.arange(768) + 0.5) * size - 0.5
    assert np.abs(window.frame_indices - exact.clip(0, frames - 1)).max() <= 0.5 + 1e-9


def test_targets_are_clipped_shares_of_192_steps_and_short_instances_go() -> None:
    segments = [[-5, 20], [50, 51], [50, 51.01], [80, 120], [25, 75]]
    window = training_window(
        video(segments=segments), CONFIG.grid, np.random.default_rng(0), EXPERIMENT.data.min_instance_fraction
    )
    # 50..51 is exactly 1 % of the video: not more than it, so it goes.
    expected = [[0, 38.4], [96, 51.01 * 1.92], [153.6, 192], [48, 144]]
    np.testing.assert_allclose(window.segments, expected, rtol=1e-6)
    np.testing.assert_allclose(
        grid_to_seconds(window.segments, window, CONFIG.grid), np.array(expected) / 1.92, rtol=1e-6
    )


def output(seed: int) -> DetectorOutput:
    """One window of 192 steps, all video: boundaries reach outside it, scores span four decades."""
    generator = torch.Generator().manual_seed(seed)
    points = pyramid_points(STEPS, CONFIG.head.regression_ranges)
    count = len(points)
    return DetectorOutput(
        logits=torch.randn(1, count, 1, generator=generator) * 3 - 4,
        offsets=torch.rand(1, count, 2, generator=generator) * 5,
        mask=torch.ones(1, count, dtype=torch.bool),
        points=points,
    )


def overlap(a: tuple[float, float], b: tuple[float, float], extra: float = 0.0) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / ((a[1] - a[0] + extra) + (b[1] - b[0] + extra) - shared)


def detections_by_hand(batch: DetectorOutput, seconds: float) -> list[tuple[float, float, float]]:
    """(start, end, score): NMS on the grid without a threshold, voting, top 100, then seconds."""
    everything = []
    for (t, _, _, stride), (left, right), logit in zip(
        batch.points.tolist(), batch.offsets[0].tolist(), batch.logits[0, :, 0].tolist(), strict=True
    ):
        everything.append(((t - left * stride, t + right * stride), 1 / (1 + math.exp(-logit))))
    left_over, kept = dict(enumerate(everything)), []
    while left_over:
        best = max(left_over, key=lambda i: left_over[i][1])
        segment, score = left_over.pop(best)
        if score < 0.001:
            break
        kept.append((segment, score))
        for i, (other, value) in left_over.items():
            left_over[i] = (other, value * math.exp(-(overlap(segment, other, 1e-6) ** 2) / 0.7))
    found = []
    for segment, score in kept[:100]:
        voters = [(other, weight) for other, weight in everything if overlap(segment, other) >= 0.9]
        total = sum(weight for _, weight in voters)
        ends = [sum(other[end] * weight for other, weight in voters) / total for end in (0, 1)]
        start, end = (min(max(value / STEPS * seconds, 0.0), seconds) for value in ends)
        found.append((start, end, score))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_detections_of_a_video(seed: int) -> None:
    batch, whole = output(seed), video(seconds=83.2)
    table = detections_of_video(
        [(batch, inference_windows(whole, CONFIG.grid))], CONFIG.grid, CONFIG.postprocess, 1
    )
    expected = detections_by_hand(batch, 83.2)
    assert table.num_rows == len(expected) == 100
    assert set(table["label"].to_pylist()) == {0}
    found = np.stack([table[name].to_numpy() for name in ("start", "end", "score")], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert found[:, 0].min() == 0 and found[:, 1].max() == 83.2  # boundaries do get clipped

    probabilities = np.full(200, 0.001)
    probabilities[[17, 150]] = 0.3, 0.5
    top = CONFIG.postprocess.external_top_classes
    named = VideoClasses(Annotations((), ()), {"v": probabilities}, top).name(table)
    assert named.num_rows == 200
    for label, probability in [(150, 0.5), (17, 0.3)]:
        part = named.filter(pc.equal(named["label"], label))
        np.testing.assert_array_equal(np.stack([part["start"], part["end"]], axis=1), found[:, :2])
        np.testing.assert_allclose(part["score"], found[:, 2] * probability, rtol=1e-12)


def test_blocked_videos_are_neither_tested_nor_counted_against() -> None:
    videos = [video(f"v{i}", segments=[[10, 20]], subset="validation") for i in range(4)]
    videos += [video(f"t{i}", segments=[[10, 20]]) for i in range(4)]
    data = EXPERIMENT.data.model_copy(update={"blocked_videos": ("v1", "t2", "not there")})
    parts = split(Annotations(("action",), tuple(videos)), data, seed=0)
    assert [one.id for one in parts.test.videos] == ["v0", "v2", "v3"]
    assert len(parts.fit.videos) + len(parts.selection.videos) == 4  # a list for evaluation, not for training

    names = [one.id for one in parts.test.videos]
    rows = [("v1", 0.0, 90.0, 0, 0.99), *((name, 10.0, 20.0, 0, 0.5) for name in names)]
    found = pa.table(list(map(list, zip(*rows, strict=True))), schema=DETECTION_SCHEMA)
    assert mean_average_precision(parts.test.ground_truth(), found, (0.5,), 1, names).map[0.5] == 1.0
