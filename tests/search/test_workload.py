"""What a run works through, against windows that are made, and counts by hand."""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from pbd_ray.config import load_recipe
from pbd_ray.data.source import load_split
from pbd_ray.data.windows import inference_windows, training_window
from pbd_ray.search.workload import uncached_share, workload


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ([], {}),
        (["scoring.criterion=train_loss"], {"scoring": 6}),
        (["alignment.optimizer.batch_size=4"], {"epoch": 4}),
        (["paper_protocol=true"], {"selection": "test"}),
    ],
)
def test_workload(overrides: list[str], changes: dict[str, Any], tiny_recipe: str) -> None:
    """6 fit videos, which all score, in batches of 2."""
    recipe = load_recipe(tiny_recipe, overrides)
    split = load_split(recipe, print)
    grid = recipe.experiment.detector.grid
    windows = {
        name: sum(len(inference_windows(video, grid)) for video in part.videos)
        for name, part in split.parts.items()
    }
    found = asdict(workload(recipe, split))
    del found["training_frames"]
    assert found == {
        **windows,
        "scored": windows["fit"],
        "scoring": windows["fit"],
        "epoch": 6,
    } | {key: windows[value] if isinstance(value, str) else value for key, value in changes.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["detector.grid.overlap=0.75"],
        ["detector.grid.kind=resize"],
        ["detector.grid.window_frames=96", "detector.grid.feature_steps=96"],  # longer than any video
    ],
)
def test_frames_of_training_windows(overrides: list[str], tiny_recipe: str) -> None:
    """As many as drawn ones have, but for the tenth at most that is cropped off a short video."""
    recipe = load_recipe(tiny_recipe, overrides)
    split, grid, rng = load_split(recipe, print), recipe.experiment.detector.grid, np.random.default_rng(0)
    drawn = [np.unique(training_window(video, grid, rng).frame_indices) for video in split.fit.videos]
    windows = [inference_windows(video, grid) for video in split.fit.videos]
    decoded = [np.unique([window.frame_indices for window in every]) for every in windows]
    a_window = sum(map(len, decoded)) / sum(map(len, windows))
    found = workload(recipe, split).training_frames
    assert found == pytest.approx(fmean(map(len, drawn)) / a_window, rel=0.1)


def test_uncached_share(tiny_recipe: str) -> None:
    """13 videos, some 5 to 8 s at 20 frames a second, every second frame, 20 pixels high."""
    recipe = load_recipe(tiny_recipe)
    split = load_split(recipe, print)
    frames = sum(-(-video.frames // 2) for video in split.everything().videos)
    needed = frames * 20 * (20 * 16 / 9) * 3 / 1e9
    half = load_recipe(tiny_recipe, [f"cache_gigabytes={needed / 2}"])
    assert uncached_share(half, split) == pytest.approx(0.5, abs=0.02)
    assert uncached_share(recipe, split) == 0.0
    assert uncached_share(load_recipe(tiny_recipe, ["cache_gigabytes=0"]), split) == 1.0


def test_two_sizes_of_the_fit_videos(tiny_recipe: str) -> None:
    """Training reads 24 pixels, scoring 20: both are kept."""
    recipe = load_recipe(tiny_recipe, ["detector.grid.train_short_side_pixels=24"])
    split = load_split(recipe, print)
    frames = {name: sum(-(-v.frames // 2) for v in part.videos) for name, part in split.parts.items()}
    rest = (frames["selection"] + frames["test"]) * 20**2
    needed = (frames["fit"] * (24**2 + 20**2) + rest) * 16 / 9 * 3 / 1e9
    changes = {"execution": recipe.execution.model_copy(update={"cache_gigabytes": needed / 4})}
    assert uncached_share(recipe.model_copy(update=changes), split) == pytest.approx(0.75, abs=0.01)
