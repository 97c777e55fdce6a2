"""The controller's expensive steps on a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pbd_ray.cluster.lr_sweep import sweep_learning_rates
from pbd_ray.cluster.pool import Pace, ScoringPool
from pbd_ray.cluster.score_sweep import CandidateTrials
from pbd_ray.cluster.sweep_status import SweepStatus
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
    identity = experiment_hash(recipe.experiment)[:8]
    return sweep_learning_rates(job, grid_of(job.config, None), "teacher", identity, storage, recipe, say)


class _Cluster:
    def __init__(self, recipe: Recipe, split: Split, storage: str, say: Say) -> None:
        self.pool = ScoringPool(recipe, split.everything())
        self._recipe, self._split, self._storage, self._say = recipe, split, storage, say
        self._trials: CandidateTrials | None = None
        self._status: SweepStatus | None = None

    def sweep(self, task: SweepTask, feed: Feed) -> Mapping[str, Any]:
        status = SweepStatus(task, feed, self._recipe.execution.progress_seconds, self._say)
        self._status = status
        if task.candidates:
            self._trials = CandidateTrials(task.name, task.candidates, self._recipe, self._storage)
        told = feed.seen

        def watch(pace: Pace) -> None:
            nonlocal told
            status.tell(pace)
            if self._trials is not None and feed.seen > told:
                told = feed.seen
                self._trials.seen(told)

        measured = self.pool.run(task, feed, watch)
        if len(nodes := measured["slices_per_node"]) > 1:
            shares = ", ".join(f"{count} on {node}" for node, count in sorted(nodes.items()))
            self._say(f"{task.name}: slices by node: {shares}")
        return measured

    def scored(self, task: SweepTask, scores: Sequence[CandidateScore], final: bool) -> None:
        if self._trials is None or self._status is None:
            return  # nothing was left to be scored
        self._status.scored(scores)
        self._trials.scored(scores, final)
        if final:
            self._trials = None

    def align(self, task: AlignTask) -> Alignment:
        self.pool.release()
        recipe = self._recipe
        # Every worker opens the videos by itself: this node's source is only a placeholder.
        source = local_source(recipe)
        job = alignment_job(recipe, self._split, source, task.round, task.student, task.teacher)
        identity = f"{experiment_hash(recipe.experiment)[:8]}-{task.parent_result[:8]}"
        grid, name = grid_of(job.config, task.prior), f"round-{task.round:02d}"
        return sweep_learning_rates(job, grid, name, identity, self._storage, recipe, self._say)

    def close(self) -> None:
        if self._trials is not None:
            self._trials.abandon()
        self.pool.release()
