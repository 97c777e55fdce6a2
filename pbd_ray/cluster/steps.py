"""The controller's expensive steps on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pbd_ray.cluster.lr_sweep import sweep_learning_rates
from pbd_ray.cluster.pool import ScoringPool
from pbd_ray.cluster.score_sweep import CandidateTrials
from pbd_ray.compression.candidates import CandidateScore
from pbd_ray.compression.jobs import alignment_job, teacher_job
from pbd_ray.config import Recipe, experiment_hash
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import local_source
from pbd_ray.search.rate_search import grid_of
from pbd_ray.search.state import Alignment, AlignTask, Feed, Steps, SweepTask

Say = Callable[[str], None]


@contextlib.contextmanager
def cluster_steps(recipe: Recipe, split: Split, storage: str, say: Say) -> Iterator[Steps]:
    """Steps on the connected cluster; the workers end with the context.

    Args:
        storage: directory or URI for Tune's and Train's own files.
    """
    cluster = _Cluster(recipe, split, storage, say)
    try:
        yield Steps(
            sweep=cluster.sweep, scored=cluster.scored, align=cluster.align, latency=cluster.pool.latency
        )
    finally:
        cluster.close()


def fit_teacher(recipe: Recipe, split: Split, storage: str, say: Say) -> Alignment:
    """Fit the uncompressed detector with Ray Train; a grid of one learning rate."""
    job = teacher_job(recipe, split, local_source(recipe), say)
    name = f"teacher-{experiment_hash(recipe.experiment)[:8]}"
    return sweep_learning_rates(job, grid_of(job.config, None), name, storage, recipe, say)


class _Cluster:
    def __init__(self, recipe: Recipe, split: Split, storage: str, say: Say) -> None:
        self.pool = ScoringPool(recipe, split.everything())
        self._recipe, self._split, self._storage, self._say = recipe, split, storage, say
        self._trials: CandidateTrials | None = None

    def sweep(self, task: SweepTask, feed: Feed) -> Mapping[str, Any]:
        if task.candidates:
            self._trials = CandidateTrials(task.name, task.candidates, self._storage)
        return self.pool.run(task, feed, self._say, self._trials.seen if self._trials else None)

    def scored(self, task: SweepTask, scores: Sequence[CandidateScore], final: bool) -> None:
        if self._trials is None:
            return  # nothing was left to be scored
        self._trials.scored(scores, final)
        if final:
            self._trials = None

    def align(self, task: AlignTask) -> Alignment:
        self.pool.release()
        recipe = self._recipe
        # Every worker opens the videos by itself: this node's source is only a placeholder.
        source = local_source(recipe)
        job = alignment_job(recipe, self._split, source, task.round, task.student, task.teacher)
        # Ray Train resumes any run of the same name: the name holds all that decides the run.
        identity = f"{experiment_hash(recipe.experiment)[:8]}-{task.parent_result[:8]}"
        return sweep_learning_rates(
            job,
            grid_of(job.config, task.prior),
            f"round-{task.round:02d}-{identity}",
            self._storage,
            recipe,
            self._say,
        )

    def close(self) -> None:
        if self._trials is not None:
            self._trials.abandon()
        self.pool.release()
