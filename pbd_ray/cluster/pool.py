"""Scoring workers: actors that pull slices of videos and return each slice's rows.

Slices hold videos, never candidates: a worker decodes a video once and scores every candidate on it.
Only the driver writes to the run directory. A worker that dies costs the slice it had, which is done
again by another. As many workers are started as the recipe allows, the slices want and the nodes hold;
they live over several sweeps and are released before fine-tuning, whose workers need their CPUs.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from pbd_ray.cluster.metrics_export import DECODE_WAIT, RETRIES
from pbd_ray.cluster.scoring_worker import ScoringWorker, WorkerSpec
from pbd_ray.cluster.session import worker_capacity, worker_resources
from pbd_ray.config import Recipe, RunError, UserError, one_line
from pbd_ray.data.annotations import Annotations
from pbd_ray.search.state import Feed, Model, SweepTask, Work
from pbd_ray.search.sweeping import stage_of

_POLL_SECONDS = 1.0
_NUMBERS = itertools.count(1)
"""Of workers, whatever their pool: a name is free only some time after its actor's end."""


class WorkersLost(RunError):
    """A slice took down one worker after another."""


@dataclass(frozen=True)
class Pace:
    """How a sweep goes."""

    workers: int
    windows_per_second: float
    """Of all workers since the sweep's start; what a worker is at is not in it."""


class ScoringPool:
    """The driver's side: starts workers, hands out slices, replaces the dead."""

    def __init__(self, recipe: Recipe, annotations: Annotations) -> None:
        videos = {video.id: video for video in annotations.videos}
        self._execution = recipe.execution
        self._spec = ray.put(WorkerSpec(recipe, len(annotations.classes), videos))
        self.workers: list[Any] = []
        """Actors that are there, placed or still waiting for a place."""

    def run(
        self,
        task: SweepTask,
        feed: Feed,
        watch: Callable[[Pace], None] = lambda pace: None,
    ) -> dict[str, Any]:
        """Score slices until the feed ends.

        Args:
            watch: called about once a second.

        Returns:
            Measured facts: slices per node, retries.

        Raises:
            UserError: a video that does not decode, unless the feed goes on without it.
            WorkersLost: a slice failed `task_retries` + 1 times because its worker died.
        """
        sweep = _Sweep(self, task, feed, self._execution.task_retries)
        self._grow(min(self._execution.max_workers, feed.remaining))
        for worker in self.workers:
            sweep.start(worker)
        began = time.monotonic()
        while not feed.ended:
            sweep.wait(_POLL_SECONDS)
            watch(Pace(len(self.workers), sweep.windows / (time.monotonic() - began)))
        return {
            "slices_per_node": dict(sweep.per_node),
            "retries": sweep.retries,
            "workers": len(self.workers),
        }

    def latency(self, model: Model) -> dict[str, float]:
        """Latency on one worker while the others are idle.

        Raises:
            WorkersLost: it died, and so did `task_retries` others in its place.
        """
        weights = ray.put(model)
        for left in reversed(range(self._execution.task_retries + 1)):
            self._grow(1)
            worker = self.workers[0]
            try:
                measured: dict[str, float] = ray.get(worker.latency.remote(weights))
                break
            except RayActorError as error:
                RETRIES.add(1)
                self.replace(worker)
                if not left:
                    raise WorkersLost(f"latency: {one_line(error)[:300]}") from None
        return measured

    def release(self) -> None:
        """End the workers and give their resources back."""
        for worker in self.workers:
            ray.kill(worker)
        self.workers.clear()

    def replace(self, worker: Any) -> Any:
        """Another worker in the place of a dead one."""
        self.workers.remove(worker)
        return self._add()

    def _grow(self, count: int) -> None:
        while len(self.workers) < min(count, worker_capacity(self._execution)):
            self._add()

    def _add(self) -> Any:
        need = worker_resources(self._execution)
        actor = ray.remote(ScoringWorker).options(
            name=f"scoring worker {next(_NUMBERS)}", num_cpus=need["CPU"], num_gpus=need.get("GPU", 0)
        )
        worker = actor.remote(self._spec)
        self.workers.append(worker)
        return worker


class _Sweep:
    """Bookkeeping of one sweep: what waits, what runs where, what came back.

    A worker gets its first slice when it has loaded the models, so no slice waits for a worker that
    the cluster has not placed yet.
    """

    def __init__(self, pool: ScoringPool, task: SweepTask, feed: Feed, retries: int) -> None:
        self._pool = pool
        # Weights go once into the object store; the task that travels with every call carries none.
        self._models = (ray.put(task.model), ray.put(task.teacher))
        self._task = task.without_weights()
        self._stage = stage_of(task)
        self._feed = feed
        self._allowed = retries
        self._losses: Counter[int | None] = Counter()
        self._nodes: dict[Any, str] = {}
        self._running: dict[Any, tuple[Any, Work | None]] = {}
        self._idle: list[Any] = []
        self.per_node: Counter[str] = Counter()
        self.windows = 0

    @property
    def retries(self) -> int:
        return self._losses.total()

    def start(self, worker: Any) -> None:
        """Give a worker the models; slices follow once it has them."""
        load = worker.load.options(name=f"ScoringWorker.load {self._task.name}")
        self._running[load.remote(self._task, *self._models)] = (worker, None)

    def wait(self, seconds: float) -> None:
        """Take what ended within the time; who is idle goes on with the next slices."""
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=seconds)
        for reference in ready:
            worker, work = self._running.pop(reference)
            try:
                result = ray.get(reference)
            except (RayActorError, ObjectLostError) as error:  # the latter: its node, with what it returned
                self._replace(worker, work, error)
                self._hand_out()
                continue
            except RayTaskError as error:
                if not isinstance(error.cause, UserError):
                    raise
                if work is None:  # its own line, without the worker's traceback
                    raise error.cause from None
                self._feed.refuse(work, error.cause)
                self._idle.append(worker)
                self._hand_out()
                continue
            if work is None:
                self._nodes[worker] = result
            else:
                self.per_node[self._nodes[worker]] += 1
                self.windows += result.windows
                DECODE_WAIT.add(result.decode_wait_seconds, stage=self._stage)
                self._feed.give(work, result.rows)  # at a barrier it decides whom the next slice is for
            self._idle.append(worker)
            self._hand_out()

    def _hand_out(self) -> None:
        while self._idle and (work := self._feed.take()) is not None:
            worker = self._idle.pop()
            score = worker.score.options(name=f"ScoringWorker.score {self._task.name}")
            self._running[score.remote(work)] = (worker, work)

    def _replace(self, worker: Any, work: Work | None, error: RayError) -> None:
        index = None if work is None else work.piece.index
        self._losses[index] += 1
        RETRIES.add(1)
        # A node that dies may take several workers that were starting: each has its own tries.
        tries = (self._allowed + 1) * (len(self._pool.workers) if work is None else 1)
        if self._losses[index] >= tries:
            what = "its start" if index is None else f"slice {index}"
            raise WorkersLost(
                f"{self._task.name}: {what} took down {self._losses[index]} workers: {one_line(error)[:300]}"
            ) from None
        if work is not None:
            self._feed.put_back(work)
        self.start(self._pool.replace(worker))
