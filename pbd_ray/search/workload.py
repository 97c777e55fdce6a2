"""What a run works through, counted from the annotations: no video is opened."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pbd_ray.config import OptimizerConfig, Recipe
from pbd_ray.data.annotations import Split, Video
from pbd_ray.data.windows import grid_frames, inference_window_count
from pbd_ray.report.forecast import Workload
from pbd_ray.search.slices import scoring_videos

ASPECT = 16 / 9
"""How wide frames are taken to be: annotations do not say."""


def workload(recipe: Recipe, split: Split) -> Workload:
    """What a run on these videos works through."""
    experiment = recipe.experiment
    scored = scoring_videos(split.fit, experiment.scoring.video_fraction, experiment.seed)
    windows = window_count(recipe, scored.videos)
    return Workload(
        fit=window_count(recipe, split.fit.videos),
        scored=windows,
        scoring=len(scored.videos) if experiment.scoring.criterion == "train_loss" else windows,
        selection=window_count(recipe, split.selection.videos),
        test=window_count(recipe, split.test.videos),
        epoch=epoch_windows(experiment.alignment.optimizer, split),
        training_frames=_training_frames(recipe, split.fit.videos),
    )


def uncached_share(recipe: Recipe, split: Split) -> float:
    """Share of the decoded frames for which `execution.cache_gigabytes` has no room."""
    experiment, grid = recipe.experiment, recipe.experiment.detector.grid
    training, inference = (
        {max(side, grid.crop_pixels)} for side in (grid.train_short_side_pixels, grid.test_short_side_pixels)
    )
    if experiment.scoring.drops is None and experiment.scoring.criterion != "train_loss":
        training |= inference  # the cache keeps a file for each size
    needed = 0.0
    for part, sides in ((split.fit, training), (split.selection, inference), (split.test, inference)):
        frames = sum(len(grid_frames(video, grid)) for video in part.videos if video.frames)
        needed += frames * 3 * ASPECT * sum(side**2 for side in sides)
    return max(0.0, 1 - recipe.execution.cache_gigabytes * 1e9 / needed) if needed else 0.0


def epoch_windows(optimizer: OptimizerConfig, split: Split) -> int:
    """Windows of an epoch (`compression.epochs.epoch_batches`)."""
    batch = min(optimizer.batch_size, len(split.fit.videos))
    return len(split.fit.videos) // batch * batch


def window_count(recipe: Recipe, videos: Sequence[Video]) -> int:
    """Windows as inference cuts them."""
    return sum(inference_window_count(video, recipe.experiment.detector.grid) for video in videos)


def _training_frames(recipe: Recipe, videos: Sequence[Video]) -> float:
    """Of `Workload`. What cropping takes off short videos is not looked at."""
    grid = recipe.experiment.detector.grid
    frames = [len(grid_frames(video, grid)) for video in videos]
    window = fmean(min(count, grid.window_frames) for count in frames)
    return window * window_count(recipe, videos) / sum(frames)
