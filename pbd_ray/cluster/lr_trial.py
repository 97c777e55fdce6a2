"""One Tune trial of the learning-rate grid: it drives a Ray Train run and computes nothing.

Every trial, and every controller that Ray Train starts for it, is a process: this module and what it
imports is all they load, so the training code itself is imported in the training workers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer

# What `ray.train` exports at run time; type checkers see the first version's classes there.
from ray.train.v2.api import config as train_config
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.tune.integration.ray_train import TuneReportCallback

from pbd_ray.cluster.session import worker_resources
from pbd_ray.config import Execution, Recipe


@dataclass(frozen=True)
class TrialSpec:
    """What all trials of a grid share."""

    job: Any
    """Reference to the FineTuneJob in the object store."""
    name: str
    storage: dict[str, Any]
    """Keywords of RunConfig that say where its files are."""
    recipe: Recipe
    until: int
    """Number of epochs to train to."""


def run_name(name: str, rate: float) -> str:
    """Name of one learning rate's run: Ray Train resumes whatever has it, so all digits are in it."""
    return f"{name}-lr-{rate!r}"


def drive_trainer(config: dict[str, Any], run: TrialSpec) -> None:
    """One learning rate: drive a Ray Train run to its end and say where its last checkpoint lies, or why
    there is none.

    What Train gave up after its own tries is reported and not raised: Tune would have all of them again. It
    starts this function anew only where this process or Train's controller was lost.
    """
    index, rate = config["grid"]
    execution = run.recipe.execution
    need = worker_resources(execution)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "job": run.job,
            "grid_index": index,
            "learning_rate": rate,
            "recipe": run.recipe,
            "until": run.until,
        },
        torch_config=TorchConfig(backend=_backend(execution)),
        scaling_config=train_config.ScalingConfig(
            num_workers=execution.train_workers, use_gpu="GPU" in need, resources_per_worker=need
        ),
        run_config=train_config.RunConfig(  # type: ignore[arg-type]
            name=run_name(run.name, rate),
            failure_config=train_config.FailureConfig(max_failures=execution.task_retries),
            checkpoint_config=train_config.CheckpointConfig(num_to_keep=1),
            callbacks=[TuneReportCallback()],
            logging_config=train_config.LoggingConfig(log_level="WARNING"),
            **run.storage,
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        tune.report({"last_checkpoint": None, "diverged": None, "failed": failure_reason(error)})
        return
    path = None if result.checkpoint is None else result.checkpoint.path
    diverged = (result.metrics or {}).get("diverged")
    tune.report({"last_checkpoint": path, "diverged": diverged, "failed": None})


def failure_reason(error: TrainingFailedError) -> str:
    """The line of Train's error that says what happened: the first of Ray's words about a process that died,
    the last of a traceback."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    rank = min(failures, default=None)
    cause: Any = error if rank is None else failures[rank]
    cause = getattr(cause, "health_check_failure", cause)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    line = lines[0 if isinstance(cause, RayActorError) else -1]
    return line if rank is None else f"training worker {rank}: {line}"


def _backend(execution: Execution) -> str | None:
    """None: nccl on GPUs, gloo on CPUs. nccl refuses two ranks on one GPU, which gloo serves as well."""
    shared = 0 < execution.gpus_per_worker < 1 and execution.train_workers > 1
    return "gloo" if shared else None


def _train_worker(config: dict[str, Any]) -> None:
    from pbd_ray.cluster.train_loop import train_worker

    train_worker(config)
