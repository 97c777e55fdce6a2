"""The learning-rate grid: one Tune trial per learning rate, each a Ray Train run.

How the resources add up: a trial only drives its trainer and holds no CPU (0.001 of the head's own
resource), so trials never take what workers need. A trainer's gang is `train_workers` bundles of
`cpus_per_worker` CPUs (and GPUs); at most floor(workers the nodes hold / train_workers) trials run at
once, so every gang that is asked for can be placed, on 1, 2 or many cores. The scoring pool must have
been released before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import tune

from pbd_ray.cluster.lr_trial import TrialSpec, drive_trainer, run_name
from pbd_ray.cluster.ray_storage import ray_storage
from pbd_ray.cluster.session import HEAD_RESOURCE, worker_capacity
from pbd_ray.cluster.train_loop import read_checkpoint
from pbd_ray.compression.epochs import EpochReport, choose_run, curves_table, finished_model
from pbd_ray.compression.jobs import FineTuneJob
from pbd_ray.config import Recipe, RunError, one_line
from pbd_ray.search.patience import StorageError, patiently
from pbd_ray.search.state import Alignment
from pbd_ray.search.storage import Storage

_STORAGE_TRACEBACK = "pyarrow/error.pxi"
"""In the text of a trial's error, which is all that Tune hands on, where its storage failed."""


class AlignmentFailed(RunError):
    """A learning rate did not end, or none of them with a usable model."""


def sweep_learning_rates(
    job: FineTuneJob,
    learning_rates: Sequence[float],
    name: str,
    storage: str,
    recipe: Recipe,
    say: Callable[[str], None],
) -> Alignment:
    """Fine-tune with every learning rate and return the model that is best on the selection videos.

    Interrupted and started again with the same `name` and `storage`, every run goes on at its epoch.

    Args:
        name: unique to (run, round, parent, experiment): Ray Train resumes whatever has this name.
        storage: directory or URI for Tune's and Train's files.

    Raises:
        AlignmentFailed: a run failed, or all of them diverged.
        StorageError: a run's storage failed for good.
        KeyboardInterrupt: some did not end.
    """
    execution = recipe.execution
    files = ray_storage(storage)
    shared = TrialSpec(ray.put(job), name, files, recipe)
    at_once = max(1, worker_capacity(execution) // execution.train_workers)
    if execution.max_concurrent_learning_rates is not None:
        at_once = min(at_once, execution.max_concurrent_learning_rates)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(drive_trainer, run=shared), {HEAD_RESOURCE: 0.001}),
        param_space={"grid": tune.grid_search(list(enumerate(learning_rates)))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            trial_name_creator=lambda trial: run_name(name, trial.config["grid"][1]),
            trial_dirname_creator=lambda trial: run_name(name, trial.config["grid"][1]),
        ),
        run_config=tune.RunConfig(
            name=f"{name}-tune",
            verbose=0,
            callbacks=[_Progress(job, say)],
            failure_config=tune.FailureConfig(max_failures=execution.task_retries),
            **files,
        ),
    )
    try:
        grid = tuner.fit()
    except OSError as error:
        raise _storage_failed(f"{name}: {one_line(error)}") from None
    results = [grid[place] for place in range(len(grid))]
    ended = {tuple(result.config["grid"]): result for result in results if result.config}
    missing = [rate for index, rate in enumerate(learning_rates) if (index, rate) not in ended]
    if missing:  # Tune takes an interrupt for itself and returns as if all were well
        raise KeyboardInterrupt(f"{name}: learning rates {missing} have not ended")
    return _choose(job, [ended[pair] for pair in enumerate(learning_rates)], storage, say)


def _choose(job: FineTuneJob, results: Sequence[Any], storage: str, say: Callable[[str], None]) -> Alignment:
    runs: list[tuple[FineTuneJob, Path | str, tuple[EpochReport, ...]]] = []
    problems: list[str] = []
    for result in results:
        index, rate = result.config["grid"]
        failed = result.error or result.metrics["failed"]
        if failed:  # without it this learning rate might have been chosen
            raise _failed(rate, one_line(failed))
        path = result.metrics["last_checkpoint"]
        if path is None:
            problems.append(f"learning rate {rate:g}: {result.metrics['diverged']}")
            say(problems[-1])
            continue
        history, _ = _read(path, storage)
        runs.append((replace(job, learning_rate=rate, grid_index=index), path, history))
    if not runs:
        raise AlignmentFailed("no learning rate ended well: " + "; ".join(problems))
    histories = [history for _, _, history in runs]
    chosen, epoch = choose_run(histories)
    winner, path, _ = runs[chosen]
    seconds = {f"{run.learning_rate:g}": sum(row.seconds for row in history) for run, _, history in runs}
    return Alignment(
        learning_rate=winner.learning_rate,
        epoch=epoch + 1,
        model=finished_model(winner, _read(path, storage)[1]),
        curves=curves_table(histories),
        measured={"train_seconds": seconds, "failed": problems},
    )


def _failed(rate: float, reason: str) -> RunError:
    problem = f"learning rate {rate:g}: {reason[-300:]}"
    if _STORAGE_TRACEBACK in reason:
        return _storage_failed(problem)
    return AlignmentFailed(f"{problem}; the same command goes on from here")


def _storage_failed(problem: str) -> StorageError:
    return StorageError(f"{problem}; the same command goes on from here")


class _Progress(tune.Callback):
    """A line for every epoch of every run, in the driver's log."""

    def __init__(self, job: FineTuneJob, say: Callable[[str], None]) -> None:
        self._epochs = job.config.optimizer.epochs
        self._say = say

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if "total" not in result:
            return
        quality = result.get("selection_map")
        shown = "" if quality is None or math.isnan(quality) else f", selection mAP {quality:.4f}"
        self._say(
            f"{trial}: epoch {result['epoch'] + 1}/{self._epochs}, loss {result['total']:.4f}{shown}"
            f" ({result['seconds']:.0f} s)"
        )


def _read(path: Path | str, storage: str) -> tuple[tuple[EpochReport, ...], Any]:
    checkpoint = ray.train.Checkpoint(str(path), Storage.at(storage).filesystem)

    def download() -> tuple[tuple[EpochReport, ...], Any]:
        with checkpoint.as_directory() as directory:
            return read_checkpoint(Path(directory))

    return patiently(download, f"read {path}")
