"""Runs of an ablation that do not need each other: one Ray Tune sweep, or one after the other in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.logger import JsonLoggerCallback

from pbd_ray.cluster.ablation_trial import run_trial
from pbd_ray.cluster.monitoring import say, throttled
from pbd_ray.cluster.ray_storage import ray_storage
from pbd_ray.cluster.session import worker_capacity, worker_resources
from pbd_ray.config import Execution, one_line
from pbd_ray.search.ablation_run import RunTask, Shared, attempt

Outcomes = Mapping[str, str | None]
"""By name of the run: None, or why it failed."""


def run_here(tasks: Sequence[RunTask], shared: Shared, execution: Execution) -> Outcomes:
    """One after the other, without Ray."""
    outcomes: dict[str, str | None] = {}
    for task in tasks:
        progress = _progress(task.name, throttled(execution.progress_seconds))
        outcomes[task.name] = attempt(task, shared, progress)
        _tell_end(task.name, outcomes, len(tasks))
    return outcomes


def run_on_ray(
    tasks: Sequence[RunTask], shared: Shared, name: str, storage: str, execution: Execution
) -> Outcomes:
    """One Tune trial each, as many at once as `max_workers` and the cluster's workers allow.

    Args:
        name: of the sweep, for the dashboard.
        storage: directory or URI for Tune's own files.
    """
    need = worker_resources(execution)
    at_once = min(execution.max_workers, worker_capacity(execution), len(tasks))
    trainable = tune.with_parameters(run_trial, tasks={task.name: task for task in tasks}, shared=shared)
    tuner = tune.Tuner(
        tune.with_resources(trainable, need),
        param_space={"run": tune.grid_search([task.name for task in tasks])},
        tune_config=tune.TuneConfig(
            reuse_actors=True,  # torch is loaded once a worker and not once a run
            max_concurrent_trials=at_once,
            trial_name_creator=lambda trial: str(trial.config["run"]),
            trial_dirname_creator=lambda trial: str(trial.config["run"]),
        ),
        run_config=tune.RunConfig(
            name=name,
            verbose=0,
            callbacks=[JsonLoggerCallback(), _Lines(len(tasks), throttled(execution.progress_seconds))],
            failure_config=tune.FailureConfig(max_failures=execution.task_retries),
            **ray_storage(storage),
        ),
    )
    results = tuner.fit()
    listed = [results[place] for place in range(len(results))]
    outcomes = {
        result.config["run"]: _outcome(result) for result in listed if result.config and _has_ended(result)
    }
    missing = [task.name for task in tasks if task.name not in outcomes]
    if missing:  # Tune takes an interrupt for itself and returns as if all were well
        raise KeyboardInterrupt(f"{name}: {missing} have not ended")
    return outcomes


def _has_ended(result: Any) -> bool:
    return bool(result.error) or "failed" in (result.metrics or {})


def _outcome(result: Any) -> str | None:
    """Of a process that was lost more than `task_retries` times Tune has the error; else the run itself."""
    if result.error:
        return one_line(result.error)[-300:]
    reason: str | None = result.metrics["failed"]
    return reason


def _progress(name: str, tell: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: tell(f"{name}: {line}")


def _tell_end(name: str, outcomes: Outcomes, of: int) -> None:
    reason = outcomes[name]
    how = "done" if reason is None else f"failed: {reason}"
    say(f"run {len(outcomes)} of {of}, {name}: {how}")


class _Lines(tune.Callback):
    """Lines of the runs in the driver's log: the end of each, and in between not too many."""

    def __init__(self, of: int, tell: Callable[[str], None]) -> None:
        self._of = of
        self._tell = tell
        self._outcomes: dict[str, str | None] = {}

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if "failed" not in result:
            self._tell(f"{trial}: {result.get('line', '')}")
        elif str(trial) not in self._outcomes:
            self._outcomes[str(trial)] = result["failed"]
            _tell_end(str(trial), self._outcomes, self._of)
