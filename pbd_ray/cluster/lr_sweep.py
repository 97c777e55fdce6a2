"""The learning-rate grid: one Tune trial per learning rate, each a Ray Train run.

With successive halving every rung is a Tune sweep of its own over what is left of the grid, and the Train
runs go on from their checkpoints under the same names.

How the resources add up: a trial only drives its trainer and holds no CPU (0.001 of the head's own
resource), so trials never take what workers need. A trainer's gang is `train_workers` bundles of
`cpus_per_worker` CPUs (and GPUs); at most floor(workers the nodes hold / train_workers) trials run at
once, so every gang that is asked for can be placed, on 1, 2 or many cores. The scoring pool must have
been released before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray import tune
from safetensors.torch import load

from pbd_ray.cluster.alignment_status import AlignmentStatus
from pbd_ray.cluster.loggers import tune_loggers
from pbd_ray.cluster.lr_trial import TrialSpec, drive_trainer, run_name
from pbd_ray.cluster.ray_storage import ray_storage
from pbd_ray.cluster.session import HEAD_RESOURCE, worker_capacity
from pbd_ray.cluster.train_loop import HISTORY, STATE
from pbd_ray.compression.blocks import Model
from pbd_ray.compression.epochs import finished_model, history_from_json
from pbd_ray.compression.finetune import Diverged
from pbd_ray.compression.jobs import FineTuneJob
from pbd_ray.config import Execution, Recipe, RunError, one_line
from pbd_ray.search.patience import StorageError, patiently
from pbd_ray.search.rate_search import GridRate, RateRun, chosen_alignment, search_rates
from pbd_ray.search.state import Alignment
from pbd_ray.search.storage import Storage


class AlignmentFailed(RunError):
    """A learning rate could not be trained to its end, or none ended with a usable model."""


def sweep_learning_rates(
    job: FineTuneJob,
    grid: Sequence[GridRate],
    name: str,
    identity: str,
    storage: str,
    recipe: Recipe,
    say: Callable[[str], None],
) -> Alignment:
    """Fine-tune with the learning rates of a grid and return the model that is best on the selection videos.

    Interrupted and started again with the same `name`, `identity` and `storage`, every run goes on at its
    epoch.

    Args:
        name: for people, in the dashboard.
        identity: unique to (run, parent, experiment): Ray Train resumes whatever has that name in that place.
        storage: directory or URI for Tune's and Train's files.

    Raises:
        AlignmentFailed: every run diverged, or one failed otherwise, for good: without it another learning
            rate might be chosen.
        StorageError: Tune's storage failed for good.
        KeyboardInterrupt: some did not end.
    """
    shared, place = ray.put(job), Storage.at(storage).uri(identity)
    checkpoints: dict[GridRate, str | None] = {}

    def train(entries: Sequence[GridRate], until: int) -> Mapping[GridRate, RateRun]:
        spec = TrialSpec(shared, name, ray_storage(place), recipe, until)
        loggers = tune_loggers(recipe, storage)
        status = AlignmentStatus(job.round, len(entries), until, recipe.execution.progress_seconds, say)
        runs = {}
        for entry, ended in _sweep(entries, spec, [status, *loggers]).items():
            path, diverged = ended["last_checkpoint"], ended["diverged"]
            checkpoints[entry] = path
            history = () if path is None else history_from_json(_read(path, HISTORY, storage).decode())
            runs[entry] = RateRun(history, diverged)
            if diverged is not None:
                say(f"learning rate {entry.rate:g}: {diverged}")
        return runs

    def model_of(chosen: GridRate) -> Model:
        path = checkpoints[chosen]
        assert path is not None, "a run that is chosen has epochs behind it"
        own = replace(job, learning_rate=chosen.rate, grid_index=chosen.index)
        return finished_model(own, load(_read(path, STATE, storage)))

    try:
        runs = search_rates(grid, job.config, train)
    except Diverged as reason:
        raise AlignmentFailed(f"no learning rate ended well: {reason}") from None
    return chosen_alignment(runs, job.config.optimizer.epochs, model_of)


def _sweep(
    entries: Sequence[GridRate], spec: TrialSpec, callbacks: list[tune.Callback]
) -> dict[GridRate, Mapping[str, Any]]:
    """One Tune sweep; what every trial reported last."""
    sweep = f"{spec.name}-until-{spec.until}-tune"
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(drive_trainer, run=spec), {HEAD_RESOURCE: 0.001}),
        param_space={"grid": tune.grid_search([(entry.index, entry.rate) for entry in entries])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=runs_at_once(spec.recipe.execution),
            trial_name_creator=lambda trial: run_name(spec.name, trial.config["grid"][1]),
            trial_dirname_creator=lambda trial: run_name(spec.name, trial.config["grid"][1]),
        ),
        run_config=tune.RunConfig(
            name=sweep,
            verbose=0,
            callbacks=callbacks,
            failure_config=tune.FailureConfig(max_failures=spec.recipe.execution.task_retries),
            **spec.storage,
        ),
    )
    try:
        results = tuner.fit()
    except OSError as error:
        raise StorageError(f"{sweep}: {one_line(error)}; {_GOES_ON}") from None
    listed = [results[place] for place in range(len(results))]
    ended = {tuple(result.config["grid"]): result for result in listed if result.config}
    missing = [entry.rate for entry in entries if (entry.index, entry.rate) not in ended]
    if missing:  # Tune takes an interrupt for itself and returns as if all were well
        raise KeyboardInterrupt(f"{sweep}: learning rates {missing} have not ended")
    return {entry: _reported(entry, ended[entry.index, entry.rate]) for entry in entries}


_GOES_ON = "the same command goes on from here"


def _reported(entry: GridRate, result: Any) -> Mapping[str, Any]:
    metrics: Mapping[str, Any] = result.metrics or {}
    failed = result.error or metrics["failed"]
    if failed:
        raise AlignmentFailed(f"learning rate {entry.rate:g}: {one_line(failed)[-300:]}; {_GOES_ON}")
    return metrics


def runs_at_once(execution: Execution) -> int:
    """How many learning rates train side by side."""
    fit = max(1, worker_capacity(execution) // execution.train_workers)
    limit = execution.max_concurrent_learning_rates
    return fit if limit is None else min(fit, limit)


def _read(checkpoint: str, file: str, storage: str) -> bytes:
    filesystem = Storage.at(storage).filesystem

    def download() -> bytes:
        with filesystem.open_input_stream(f"{checkpoint}/{file}") as stream:
            return bytes(stream.read())

    return patiently(download, f"read {checkpoint}/{file}")
