"""Where a job's work runs, as `execution.backend` says: on Ray, or in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from pbd_ray.cluster.holder import sole_driver
from pbd_ray.cluster.loggers import require_loggers
from pbd_ray.cluster.lr_sweep import runs_at_once
from pbd_ray.cluster.metrics_export import exporting
from pbd_ray.cluster.monitoring import say
from pbd_ray.cluster.session import ray_session, worker_capacity
from pbd_ray.cluster.steps import cluster_steps, fit_teacher
from pbd_ray.compression.jobs import teacher_job
from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import VideoSource
from pbd_ray.data.windows import Window
from pbd_ray.search.in_process import fit_grid, in_process_steps
from pbd_ray.search.owner import Owner
from pbd_ray.search.rate_search import grid_of
from pbd_ray.search.state import Alignment, Steps
from pbd_ray.search.storage import Storage


@contextlib.contextmanager
def backend(recipe: Recipe, workers: int) -> Iterator[None]:
    """Ray, connected and held until the context ends; or this process, with the threads of a worker.

    Args:
        workers: how many the cluster must hold at once.

    Raises:
        ConfigError: a logger of the recipe cannot be used.
        ResourcesError: the cluster would never hold them.
    """
    if recipe.execution.backend == "local":
        torch.set_num_threads(recipe.execution.threads_per_worker)
        yield
        return
    require_loggers(recipe)
    with ray_session(recipe.execution, say, workers), exporting(recipe.run_dir):
        yield


def alone_in_cluster(
    recipe: Recipe, storage: Storage, owner: Owner
) -> contextlib.AbstractContextManager[None]:
    """Where the owner's record alone excludes nobody, the drivers of one cluster exclude each other."""
    if recipe.execution.backend == "local" or storage.exclusive:
        return contextlib.nullcontext()
    return sole_driver(storage.root, str(owner))


@contextlib.contextmanager
def backend_steps(
    recipe: Recipe,
    split: Split,
    source: VideoSource,
    storage: str,
    seen: Callable[[Window], None] | None = None,
) -> Iterator[Steps]:
    """The round loop's expensive steps.

    Args:
        storage: directory or URI for the cluster's own files.
        seen: told how far a sweep is inside a video, where this process runs it.
    """
    if recipe.execution.backend == "local":
        yield in_process_steps(recipe, split, source, say, seen)
        return
    with cluster_steps(recipe, split, storage, say) as steps:
        yield steps


def side_by_side(recipe: Recipe) -> tuple[int, int]:
    """How many scoring workers, and how many of the learning rates, there are at once."""
    execution = recipe.execution
    if execution.backend == "local":
        return 1, 1
    rates = max(1, len(recipe.experiment.alignment.learning_rates))
    return min(execution.max_workers, worker_capacity(execution)), min(rates, runs_at_once(execution))


def fit_uncompressed(recipe: Recipe, split: Split, source: VideoSource, storage: str) -> Alignment:
    """Fit the uncompressed detector as `experiment.teacher` says."""
    say("fitting the uncompressed detector")
    if recipe.execution.backend == "ray":
        return fit_teacher(recipe, split, storage, say)
    job = teacher_job(recipe, split, source, say)
    return fit_grid(job, grid_of(job.config, None), say, torch.device(recipe.execution.device))
