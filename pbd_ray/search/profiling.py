"""Measure what the stages of a run take, on a few videos, by the steps that the run itself will take.

What a pool takes is measured by evaluations of two groups of videos, A and B: thrice in a pool without cached
frames, where a window takes c, and then in one that has all of them in its cache.

    A, first      start + c A                A       load + window  A
    B             load  + c B                A, B    load + window (A + B)
    A, B          load  + c (A + B)

`decode` is c less `window`. So it is counted as if nothing were cached, whatever earlier runs or plans have
left. All candidates are scored on two such groups of fit videos, from the cache; the start of their Tune
trials takes longer than many a window:

    A             load + trials + scoring  A
    A, B          load + trials + scoring (A + B)

Two short epochs of the learning rates that run at once complete it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TypeVar

from pbd_ray.compression.candidates import CandidateScore
from pbd_ray.compression.jobs import teacher_config
from pbd_ray.config import AlignmentConfig, OptimizerConfig, Recipe
from pbd_ray.data.annotations import Split, Video
from pbd_ray.report.forecast import RunSeconds, UnitSeconds
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.slices import plan_slices, scoring_videos, slice_count
from pbd_ray.search.state import Alignment, AlignTask, Model, Steps, SweepTask, without_block
from pbd_ray.search.workload import epoch_windows, window_count

VIDEOS_PER_WORKER = 3
"""In each group."""
EPOCHS, STEPS = 2, 4
"""The first epoch decodes and warms up, the second is what counts."""

Report = Callable[[str], None]
T = TypeVar("T")


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
        fit = self.few.fit
        return fit.select(_spread(self.recipe, fit.videos, len(self.few.test.videos))).videos

    def cold_seconds(self) -> tuple[float, float, float]:
        """(start, load, a window that is decoded)."""
        a, b = _groups(self.few.test.videos)
        first, second, whole = (self._evaluate(videos) for videos in (a, b, self.few.test.videos))
        window = max(0.0, whole - second) / window_count(self.recipe, a)
        load = max(0.0, second - window * window_count(self.recipe, b))
        return max(0.0, first - window * window_count(self.recipe, a)), load, window

    def warm_seconds(self) -> float:
        """A window from the cache, which holds all of the few videos afterwards."""
        a, b = _groups(self.few.test.videos)
        self._evaluate(self.few.everything().videos)
        one, both = self._evaluate(a), self._evaluate(self.few.test.videos)
        return max(0.0, both - one) / window_count(self.recipe, b)

    def scoring_seconds(self, load: float) -> tuple[float, float]:
        """(one of `Workload.scoring` with all candidates, start and end of their trials)."""
        experiment, blocks = self.recipe.experiment, self.model.kept_blocks
        criterion = experiment.scoring.criterion
        losses = criterion == "train_loss"
        teacher = self.model if losses and experiment.scoring.loss_terms == "total" else None
        task = SweepTask("plan-decoding", 0, self.model, (), criterion, "fit", teacher)
        if losses:  # at the size of training, which no evaluation has put into the cache
            self._sweep(task, self.scored)

        def seconds(videos: Sequence[Video]) -> tuple[float, float]:
            named = replace(task, name=f"plan-{len(videos)}-videos-scores", candidates=blocks)
            swept = self._sweep(named, videos)
            # What the few videos say of the candidates nobody needs to know; the trials only have to end.
            nothing = [CandidateScore(block, math.nan, None, None, len(videos)) for block in blocks]
            return swept, _timed(lambda: self.steps.scored(named, nothing, True))[1]

        def count(videos: Sequence[Video]) -> int:
            return len(videos) if losses else window_count(self.recipe, videos)

        a, b = _groups(self.scored)
        (one, _), (both, ending) = seconds(a), seconds(self.scored)
        scoring = max(0.0, both - one) / count(b)
        return scoring, max(0.0, one - load - scoring * count(a)) + ending

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
    windows = epoch_windows(config.optimizer, few)
    selection = window_count(short, few.selection.videos)
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
    """A few videos of each part, two groups of the test videos and of those that score."""
    experiment, group = recipe.experiment, VIDEOS_PER_WORKER * workers
    batches = [experiment.alignment.optimizer.batch_size]
    if experiment.teacher.source == "train":
        batches.append(experiment.teacher.optimizer.batch_size)
    trained = max(STEPS * max(batches), 2 * group)
    scored = scoring_videos(split.fit, experiment.scoring.video_fraction, experiment.seed)
    pool = scored if len(scored.videos) >= trained else split.fit
    chosen = max(2, recipe.execution.train_workers)
    tested = split.test if len(split.test.videos) > 1 else split.everything()
    return Split(
        fit=pool.select(_spread(recipe, pool.videos, trained)),
        selection=split.selection.select(_spread(recipe, split.selection.videos, chosen)),
        test=tested.select(_spread(recipe, tested.videos, 2 * group)),
    )


def _groups(videos: Sequence[Video]) -> tuple[Sequence[Video], Sequence[Video]]:
    """A and B: alike where the videos are ranked by length. Of a single video A has nothing."""
    return videos[1::2], videos[::2]


def _spread(recipe: Recipe, videos: Sequence[Video], count: int) -> list[str]:
    """Ids of so many videos, short and long ones, ranked by length."""
    ranked = sorted(videos, key=lambda video: (window_count(recipe, [video]), video.id))
    count = min(count, len(ranked))
    return [ranked[(2 * place + 1) * len(ranked) // (2 * count)].id for place in range(count)]


def _shortened(recipe: Recipe, runs_at_once: int) -> Recipe:
    """The recipe with `EPOCHS` epochs of the learning rates that run at once, and nothing logged of them."""

    def short(optimizer: OptimizerConfig) -> dict[str, Any]:
        epochs = {"epochs": EPOCHS, "schedule_epochs": EPOCHS}
        return {"optimizer": optimizer.model_copy(update=epochs), "select_every_epochs": EPOCHS}

    experiment = recipe.experiment
    alignment, teacher = experiment.alignment, experiment.teacher
    once = {"learning_rates": alignment.learning_rates[:runs_at_once], "halving": None, "later_epochs": None}
    parts = {
        "alignment": alignment.model_copy(update=short(alignment.optimizer) | once),
        "teacher": teacher.model_copy(update=short(teacher.optimizer)),
    }
    quiet = recipe.execution.model_copy(update={"loggers": ()})
    return recipe.model_copy(update={"experiment": experiment.model_copy(update=parts), "execution": quiet})


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    begin = time.perf_counter()
    found = action()
    return found, time.perf_counter() - begin
