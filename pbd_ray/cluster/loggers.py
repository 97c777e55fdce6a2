"""Where Ray Tune writes what its trials report: a JSON file always, and what `execution.loggers` names."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.logger import JsonLoggerCallback, TBXLoggerCallback

from pbd_ray.config import ConfigError, Recipe

MLFLOW_SERVER = "MLFLOW_TRACKING_URI"
_PACKAGES = {"tensorboard": ("tensorboardX", "tensorboardX"), "mlflow": ("mlflow", "mlflow-skinny")}
"""Logger -> the module that it needs, and the package that has it."""


def require_loggers(recipe: Recipe) -> None:
    """Refuse at the start what would fail when the first sweep begins.

    Raises:
        ConfigError: a logger's package is missing, or MLflow's server is not named.
    """
    for logger in recipe.execution.loggers:
        module, package = _PACKAGES[logger]
        if find_spec(module) is None:
            raise ConfigError(
                f"execution.loggers: {logger} needs the package {package}: pip install {package}"
            )
    if "mlflow" in recipe.execution.loggers and MLFLOW_SERVER not in os.environ:
        raise ConfigError(f"execution.loggers: mlflow needs {MLFLOW_SERVER}: set it for the job")


def tune_loggers(recipe: Recipe, storage: str) -> list[tune.Callback]:
    """Loggers of one Tune sweep. Tune adds none of its own (`TUNE_DISABLE_AUTO_CALLBACK_LOGGERS`).

    Args:
        storage: directory or URI of Ray's own files.
    """
    execution = recipe.execution
    loggers: list[tune.Callback] = [JsonLoggerCallback()]
    if "tensorboard" in execution.loggers:
        # Ray's files are deleted with the round's commit: these lie beside them.
        folder = execution.tensorboard_dir or Path(storage).parent / "tensorboard"
        loggers.append(_tensorboard(Path(folder)))
    if "mlflow" in execution.loggers:
        name, tags = recipe.experiment.name, {"run_dir": recipe.run_dir}
        loggers.append(MLflowLoggerCallback(os.environ[MLFLOW_SERVER], experiment_name=name, tags=tags))
    return loggers


def _tensorboard(folder: Path) -> tune.Callback:
    """Ray's own logger, but for the place: a folder a trial, of the trial's name."""
    logger = TBXLoggerCallback()
    write = logger._summary_writer_cls

    def write_there(trial_folder: str, **options: Any) -> Any:
        return write(str(folder / Path(trial_folder).name), **options)

    logger._summary_writer_cls = write_there
    return logger
