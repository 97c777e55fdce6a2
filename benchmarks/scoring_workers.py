"""One scoring worker on one core against two on two, on a real Ray."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import ray

from benchmarks.scoring_cases import ROUND, Case
from pbd_ray.cluster.pool import ScoringPool
from pbd_ray.cluster.session import ray_session
from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.candidates import SweepRows, candidate_scores
from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Annotations
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.slices import plan_slices, slice_count
from pbd_ray.search.state import SweepTask

COUNTS = (1, 2)


@dataclass(frozen=True)
class Workers:
    """Wall seconds of a round, sweep and evaluation, by the number of workers: every repeat."""

    case: str
    videos: int
    seconds: dict[int, tuple[float, ...]]

    @property
    def speedup(self) -> float:
        one, two = (statistics.median(self.seconds[count]) for count in COUNTS)
        return one / two


def compare_workers(cases: Sequence[tuple[Case, int]], repeats: int) -> list[Workers]:
    """Rounds over the first so many videos of each case, with one and with two workers in turn.

    Workers have loaded their models and scored a video before the first round; each has a core to itself,
    which its decoding threads share. The driver and Ray run wherever they find room.

    Raises:
        RuntimeError: the rows depend on the number of workers.
    """
    with ray_session(cases[0][0].recipe.execution, print):
        return [_compared(case, videos, repeats) for case, videos in cases]


def _compared(case: Case, count: int, repeats: int) -> Workers:
    videos = replace(case.videos, videos=case.videos.videos[:count])
    # As few workers would be started as there are slices: here one of each video.
    warming = replace(case.videos, videos=case.videos.videos[: max(COUNTS)])
    pools = {workers: ScoringPool(_recipe(case, workers), case.videos) for workers in COUNTS}
    seconds: dict[int, list[float]] = {workers: [] for workers in COUNTS}
    rows = []
    try:
        for workers, pool in pools.items():
            _round(case, pool, warming, workers)
            for worker, core in zip(pool.workers, sorted(os.sched_getaffinity(0)), strict=False):
                _pin(ray.get(worker.process_id.remote()), core)
        for _ in range(repeats):
            for workers, pool in pools.items():
                began = time.perf_counter()
                table = _round(case, pool, videos, workers)
                seconds[workers].append(time.perf_counter() - began)
                rows.append(_by_video(table, videos))
    finally:
        for pool in pools.values():
            pool.release()
    if any(not table.equals(rows[0]) for table in rows):
        raise RuntimeError(f"{case.name}: rows depend on the number of workers")
    return Workers(case.name, count, {workers: tuple(taken) for workers, taken in seconds.items()})


def _recipe(case: Case, workers: int) -> Recipe:
    execution = case.recipe.execution.model_copy(update={"max_workers": workers})
    return case.recipe.model_copy(update={"execution": execution})


def _round(case: Case, pool: ScoringPool, videos: Annotations, workers: int) -> pa.Table:
    """Sweep and evaluate; the rows in the order in which they came."""
    recipe, candidates = _recipe(case, workers), case.student.kept_blocks
    plan = plan_slices(videos.videos, recipe.experiment.detector.grid, slice_count(recipe.execution))
    tables: list[pa.Table] = []
    task = SweepTask("round-01-scores", ROUND, case.student, candidates, "map", "fit")
    feed = SliceFeed(plan, candidates, (), lambda work, table: tables.append(table))
    pool.run(task, feed)
    table = pa.concat_tables(tables)
    names = tuple(video.id for video in videos.videos)
    sweep = SweepRows("map", table, dict.fromkeys((*candidates, UNDROPPED), names))
    candidate_scores(sweep, recipe.experiment, videos)
    return table


def _by_video(table: pa.Table, videos: Annotations) -> pa.Table:
    return pa.concat_tables([table.filter(pc.equal(table["video"], video.id)) for video in videos.videos])


def _pin(process: int, core: int) -> None:
    """Keep all threads of a process, and those that they start, on one core."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})
