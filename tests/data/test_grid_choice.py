"""Grids for real and for drawn lengths; the recipes that they go into can be run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pbd_ray.config import load_recipe
from pbd_ray.data.annotations import Annotations, Video, load_annotations
from pbd_ray.data.grid_choice import MOST_STEPS, GridChoice, choose_grid
from pbd_ray.data.recipe_draft import SMALL, VIDEOMAE_S, Backbone, draft_recipe
from pbd_ray.data.windows import inference_windows


def drawn(seed: int) -> Annotations:
    """Videos of seconds to an hour, instances of a tenth of a second to the whole video."""
    rng = np.random.default_rng(seed)
    made = []
    typical, share = 10 ** rng.uniform(0.5, 3.5), 10 ** rng.uniform(-3, 0)
    spread = rng.uniform(0.5, 2)
    for number in range(30):
        duration, fps = typical * 10 ** rng.uniform(-spread, 0), float(rng.choice([10, 25, 30, 60]))
        length = np.clip(duration * share * 10 ** rng.normal(0, 0.3, size=3), 0.1, duration)
        start = rng.random(3) * (duration - length)
        segments = np.minimum(np.stack([start, start + length], axis=1), duration)
        frames = round(duration * fps)
        made.append(
            Video(str(number), "", "training", duration, fps, frames, segments, np.zeros(3, np.int32))
        )
    return Annotations(("a",), tuple(made))


def longest_steps(choice: GridChoice, training: Annotations) -> float:
    """Of an instance, in input steps of its own video."""
    spans = []
    for video in training.videos:
        step_seconds = choice.grid.stride_frames / video.fps
        if choice.grid.kind == "resize":
            step_seconds = video.duration_seconds / choice.grid.window_frames
        spans += (np.diff(video.segments_seconds, axis=1) / step_seconds).ravel().tolist()
    return max(spans)


def short_steps(choice: GridChoice, training: Annotations) -> float:
    """The 5th percentile of instances in feature steps of a sliding grid."""
    frames = [np.diff(video.segments_seconds, axis=1)[:, 0] * video.fps for video in training.videos]
    return float(np.percentile(np.concatenate(frames), 5)) / choice.grid.stride_frames


@pytest.mark.parametrize("seed", range(60))
def test_the_longest_instance_fits(seed: int) -> None:
    """And short ones are resolved, unless that is what the long ones cost."""
    training = drawn(seed)
    choice = choose_grid(training, 240)
    grid = choice.grid
    assert longest_steps(choice, training) <= grid.window_frames <= MOST_STEPS
    if (
        grid.kind == "sliding"
        and grid.stride_frames > 1
        and "must fit" not in choice.reasons["stride_frames"]
    ):
        assert 6 <= short_steps(choice, training) < 12
    if choice.reasons["kind"] == "every video fits into one window":
        assert all(len(inference_windows(video, grid)) == 1 for video in training.videos)
    ranges = choice.regression_ranges
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


def test_every_kind_of_grid_is_drawn() -> None:
    """The seeds above reach them all."""
    choices = [choose_grid(drawn(seed), 240) for seed in range(60)]
    kinds = [choice.reasons["kind"] for choice in choices]
    assert any(choice.grid.kind == "resize" for choice in choices)
    assert "every video fits into one window" in kinds
    assert any("must fit" in choice.reasons.get("stride_frames", "") for choice in choices)
    assert len({len(choice.regression_ranges) for choice in choices}) == 3


@pytest.mark.parametrize(
    ("folder", "recipe", "kind", "window", "stride"),
    [
        ("thumos14", "thumos14_videomae_s", "sliding", 736, 5),
        ("activitynet", "activitynet_videomae_s", "resize", 768, None),
    ],
)
def test_published_grids(
    folder: str, recipe: str, kind: str, window: int, stride: int | None, shared: Path
) -> None:
    """From the annotations alone nearly what was published: 768 of every 4th frame on THUMOS14, which does
    not hold its longest instance, and on ActivityNet 768 frames of a whole video."""
    annotations = load_annotations(shared / "data" / folder / "annotations.json")
    choice = choose_grid(annotations.subset("training"), 180)
    detector = load_recipe(recipe).experiment.detector
    assert (choice.grid.kind, choice.grid.window_frames) == (kind, window)
    assert kind == detector.grid.kind and window == pytest.approx(detector.grid.window_frames, rel=0.05)
    assert choice.regression_ranges == detector.head.regression_ranges
    if stride is None:
        assert choice.grid.feature_steps == detector.grid.feature_steps
    else:
        assert choice.grid.stride_frames == stride
    assert (choice.grid.crop_pixels, choice.grid.train_short_side_pixels) == (160, 180)


@pytest.mark.parametrize(
    ("short_side", "backbone", "pixels"),
    [
        (1080, VIDEOMAE_S, (182, 160)),
        (240, VIDEOMAE_S, (182, 160)),
        (120, VIDEOMAE_S, (120, 112)),
        (12, VIDEOMAE_S, (16, 16)),
        (1080, SMALL, (55, 48)),
    ],
)
def test_pixels_follow_the_files(short_side: int, backbone: Backbone, pixels: tuple[int, int]) -> None:
    grid = choose_grid(drawn(0), short_side, backbone.largest_pixels).grid
    assert (grid.train_short_side_pixels, grid.test_short_side_pixels) == pixels
    assert grid.crop_pixels == grid.test_short_side_pixels


@pytest.mark.parametrize("seed", range(10))
def test_a_recipe_that_loads(seed: int, tmp_path: Path) -> None:
    """With the grid chosen, for few and for many videos, and for names that want quotes."""
    training = drawn(seed)
    videos = training.videos * (1 + 4 * (seed % 2))
    choice = choose_grid(training, 120)
    backbone = (VIDEOMAE_S, SMALL)[seed % 3 == 0]
    text = draft_recipe(Annotations(("a",), videos), choice, backbone, 'odd: "name"', "/x y/#1", "/a: b.json")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    experiment, execution = recipe.experiment, recipe.execution
    assert experiment.detector.backbone.depth == backbone.depth and experiment.teacher.start == backbone.start
    assert (experiment.name, execution.data_root, execution.annotations) == (
        'odd: "name"', "/x y/#1", "/a: b.json"
    )  # fmt: skip
    drafted = experiment.detector.grid.model_copy(update={"augmentation": choice.grid.augmentation})
    assert drafted == choice.grid
    assert experiment.detector.head.regression_ranges == choice.regression_ranges
    assert experiment.data.selection_fraction == (0.1 if seed % 2 else 0.2)
    assert longest_steps(choice, training) <= experiment.detector.grid.window_frames
