"""Measure what the stages of a run take, on a few videos, by the steps that the run itself will take.

What a pool takes is measured by evaluations of two groups of videos, A and B: thrice in a pool without cached
frames, where a window takes c, and then in one that has all of them in its cache.

    A, first      start + c A                A       load + window  A
    B             load  + c B                A, B    load + window (A + B)
    A, B          load  + c (A + B)

`decode` is c less `window`. So it is counted as if nothing were cached, whatever earlier runs or plans have
left. A sweep over all candidates and two short epochs of the learning rates that run at once complete it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from pbd_ray.compression.candidates import CandidateScore
from pbd_ray.compression.jobs import teacher_config
from pbd_ray.config import AlignmentConfig, OptimizerConfig, Recipe
from pbd_ray.data.annotations import Annotations, Split, Video
from pbd_ray.data.windows import grid_frames, inference_window_count
from pbd_ray.report.forecast import RunSeconds, UnitSeconds, Workload
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.slices import plan_slices, scoring_videos, slice_count
from pbd_ray.search.state import Alignment, AlignTask, Model, Steps, SweepTask, without_block

VIDEOS_PER_WORKER = 3
"""In each group, and in the sweep over all candidates."""
EPOCHS, STEPS = 2, 4
"""The first epoch decodes and warms up, the second is what counts."""
ASPECT = 16 / 9
"""How wide frames are taken to be: annotations do not say."""

Report = Callable[[str], None]
T = TypeVar("T")


def workload(recipe: Recipe, split: Split) -> Workload:
    """What a run on these videos works through."""
    experiment = recipe.experiment
    scored = scoring_videos(split.fit, experiment.scoring.video_fraction, experiment.seed)
    windows = _windows(recipe, scored.videos)
    return Workload(
        fit=_windows(recipe, split.fit.videos),
        scored=windows,
        scoring=len(scored.videos) if experiment.scoring.criterion == "train_loss" else windows,
        selection=_windows(recipe, _selection(recipe, split).videos),
        test=_windows(recipe, split.test.videos),
        epoch=_epoch(experiment.alignment.optimizer, split),
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


def measure(
    recipe: Recipe,
    split: Split,
    teacher: Model,
    steps: Callable[[Recipe, Split], AbstractContextManager[Steps]],
    fit: Callable[[Recipe, Split], Alignment] | None,
    *,
    workers: int,
    runs_at_once: int,
    report: Report,
) -> UnitSeconds:
    """Seconds of everything that a run does over and over.

    Args:
        teacher: what is measured; its weights need not be trained.
        steps: the run's steps on part of its videos.
        fit: fits the uncompressed detector on them; None where the teacher is given.
        workers: of the scoring pool.
    """
    few, short = _sample(recipe, split, workers), _shortened(recipe, runs_at_once)
    cold = short.model_copy(update={"execution": short.execution.model_copy(update={"cache_gigabytes": 0.0})})
    with steps(cold, few) as taken:
        report(f"plan: {len(few.test.videos)} videos decoded and evaluated")
        start, load, uncached = _Pool(cold, few, taken, teacher).cold_seconds()
    fitting = align = None
    with steps(short, few) as taken:
        pool = _Pool(short, few, taken, teacher)
        report("plan: the same from the cache")
        window = pool.warm_seconds()
        report(f"plan: {len(teacher.kept_blocks)} candidates on {len(pool.scored)} videos")
        scoring, trials = pool.scoring_seconds(load)
        _, latency = _timed(lambda: taken.latency(teacher))
        if recipe.experiment.alignment.trainable != "none":
            report(
                f"plan: two short epochs of {len(short.experiment.alignment.learning_rates)} learning rates"
            )
            student = without_block(teacher, teacher.kept_blocks[len(teacher.kept_blocks) // 2])
            task = AlignTask(1, student, teacher, parent_result="plan")
            align = _run_seconds(short, few, short.experiment.alignment, lambda: taken.align(task))
    if fit is not None:
        report("plan: two short epochs of fitting the teacher")
        config = teacher_config(short.experiment.teacher)
        fitting = _run_seconds(short, few, config, lambda: fit(short, few))
    return UnitSeconds(
        workers=workers,
        runs_at_once=runs_at_once,
        start=start,
        load=load,
        decode=max(0.0, uncached - window),
        window=window,
        scoring=scoring,
        trials=trials,
        latency=latency,
        align=align,
        fit=fitting,
    )


@dataclass(frozen=True)
class _Pool:
    """Sweeps over a few videos, timed."""

    recipe: Recipe
    few: Split
    steps: Steps
    model: Model

    @property
    def scored(self) -> Sequence[Video]:
        return self.few.fit.videos[: len(self.few.test.videos) // 2]

    @property
    def groups(self) -> tuple[Sequence[Video], Sequence[Video]]:
        return self.few.test.videos[::2], self.few.test.videos[1::2]

    def cold_seconds(self) -> tuple[float, float, float]:
        """(start, load, a window that is decoded)."""
        a, b = self.groups
        first, second, whole = (self._evaluate(videos) for videos in (a, b, self.few.test.videos))
        window = max(0.0, whole - second) / _windows(self.recipe, a)
        load = max(0.0, second - window * _windows(self.recipe, b))
        return max(0.0, first - window * _windows(self.recipe, a)), load, window

    def warm_seconds(self) -> float:
        """A window from the cache, which holds all of the few videos afterwards."""
        a, b = self.groups
        self._evaluate(self.few.everything().videos)
        one, both = self._evaluate(a), self._evaluate(self.few.test.videos)
        return max(0.0, both - one) / _windows(self.recipe, b)

    def scoring_seconds(self, load: float) -> tuple[float, float]:
        """(one of `Workload.scoring` with all candidates, end of the trials)."""
        experiment, blocks = self.recipe.experiment, self.model.kept_blocks
        criterion = experiment.scoring.criterion
        guided = criterion == "train_loss" and experiment.scoring.loss_terms == "total"
        teacher = self.model if guided else None
        task = SweepTask("plan-scores", 0, self.model, blocks, criterion, "fit", teacher)
        seconds = self._sweep(task, self.scored)
        # What the few videos say of the candidates nobody needs to know; the trials only have to end.
        nothing = [CandidateScore(block, math.nan, None, None, len(self.scored)) for block in blocks]
        _, trials = _timed(lambda: self.steps.scored(task, nothing, True))
        count = len(self.scored) if criterion == "train_loss" else _windows(self.recipe, self.scored)
        return max(0.0, seconds - load) / count, trials

    def _evaluate(self, videos: Sequence[Video]) -> float:
        return self._sweep(SweepTask("plan-evaluation", 0, self.model, (), "map", "test"), videos)

    def _sweep(self, task: SweepTask, videos: Sequence[Video]) -> float:
        grid, count = self.recipe.experiment.detector.grid, slice_count(self.recipe.execution)
        slices = plan_slices(videos, grid, count)
        feed = SliceFeed(slices, task.candidates, (), lambda work, table: None)
        return _timed(lambda: self.steps.sweep(task, feed))[1]


def _run_seconds(
    short: Recipe, few: Split, config: AlignmentConfig, align: Callable[[], Alignment]
) -> RunSeconds:
    found, wall = _timed(align)
    every: list[dict[str, Any]] = list(found.measured["learning_rates"].values())
    runs = [run for run in every if run["diverged"] is None]  # one at least, or `align` had raised
    windows = _epoch(config.optimizer, few)
    selection = _windows(short, _selection(short, few).videos)
    evaluating = [
        max(0.0, run["seconds"] - sum(windows / rate for rate in run["windows_per_second"])) for run in runs
    ]
    return RunSeconds(
        start=max(0.0, wall - max(run["seconds"] for run in runs)),
        training=fmean(1 / run["windows_per_second"][-1] for run in runs),
        selection=fmean(evaluating) / max(1, selection),
        peak_memory_bytes=max(run["peak_memory_bytes"] for run in runs),
    )


def _sample(recipe: Recipe, split: Split, workers: int) -> Split:
    """A few videos of each part; twice as many test videos as one group has."""
    experiment, group = recipe.experiment, VIDEOS_PER_WORKER * workers
    batches = [experiment.alignment.optimizer.batch_size]
    if experiment.teacher.source == "train":
        batches.append(experiment.teacher.optimizer.batch_size)
    trained = max(STEPS * max(batches), group)
    scored = scoring_videos(split.fit, experiment.scoring.video_fraction, experiment.seed)
    pool = scored if len(scored.videos) >= trained else split.fit
    chosen = max(2, recipe.execution.train_workers)
    tested = split.test if len(split.test.videos) > 1 else split.everything()
    return Split(
        fit=pool.select(_spread(recipe, pool.videos, trained)),
        selection=split.selection.select(_spread(recipe, split.selection.videos, chosen)),
        test=tested.select(_spread(recipe, tested.videos, 2 * group)),
    )


def _spread(recipe: Recipe, videos: Sequence[Video], count: int) -> list[str]:
    """Ids of so many videos, short and long ones."""
    ranked = sorted(videos, key=lambda video: (_windows(recipe, [video]), video.id))
    count = min(count, len(ranked))
    return [ranked[(2 * place + 1) * len(ranked) // (2 * count)].id for place in range(count)]


def _shortened(recipe: Recipe, runs_at_once: int) -> Recipe:
    """The recipe with `EPOCHS` epochs of the learning rates that run at once, and nothing logged of them."""

    def short(optimizer: OptimizerConfig) -> dict[str, Any]:
        epochs = {"epochs": EPOCHS, "schedule_epochs": EPOCHS}
        return {"optimizer": optimizer.model_copy(update=epochs), "select_every_epochs": EPOCHS}

    experiment = recipe.experiment
    alignment, teacher = experiment.alignment, experiment.teacher
    once = {"learning_rates": alignment.learning_rates[:runs_at_once], "halving": None}
    parts = {
        "alignment": alignment.model_copy(update=short(alignment.optimizer) | once),
        "teacher": teacher.model_copy(update=short(teacher.optimizer)),
    }
    quiet = recipe.execution.model_copy(update={"loggers": ()})
    return recipe.model_copy(update={"experiment": experiment.model_copy(update=parts), "execution": quiet})


def _selection(recipe: Recipe, split: Split) -> Annotations:
    """The videos that choose the epoch (`compression.jobs`)."""
    return split.test if recipe.experiment.paper_protocol else split.selection


def _epoch(optimizer: OptimizerConfig, split: Split) -> int:
    """Windows of an epoch (`compression.epochs.epoch_batches`)."""
    batch = min(optimizer.batch_size, len(split.fit.videos))
    return len(split.fit.videos) // batch * batch


def _windows(recipe: Recipe, videos: Sequence[Video]) -> int:
    return sum(inference_window_count(video, recipe.experiment.detector.grid) for video in videos)


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    begin = time.perf_counter()
    found = action()
    return found, time.perf_counter() - begin
