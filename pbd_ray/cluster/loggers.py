"""Where Ray Tune writes what its trials report: a JSON file always, and what `execution.loggers` names."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.logger import JsonLoggerCallback, LoggerCallback, TBXLoggerCallback

from pbd_ray.cluster.monitoring import say
from pbd_ray.config import ConfigError, Recipe, one_line

MLFLOW_SERVER = "MLFLOW_TRACKING_URI"
_PACKAGES = {"tensorboard": ("tensorboardX", "tensorboardX"), "mlflow": ("mlflow", "mlflow-skinny")}
"""Logger -> the module that it needs, and the package that has it."""


def require_loggers(recipe: Recipe) -> None:
    """Refuse at the start what would fail when the first sweep begins.

    Raises:
        ConfigError: a logger's package is missing, or MLflow's server is not named or does not answer.
    """
    for logger in recipe.execution.loggers:
        module, package = _PACKAGES[logger]
        if find_spec(module) is None:
            raise ConfigError(
                f"execution.loggers: {logger} needs the package {package}: pip install {package}"
            )
    if "mlflow" not in recipe.execution.loggers:
        return
    server = os.environ.get(MLFLOW_SERVER)
    if server is None:
        raise ConfigError(f"execution.loggers: mlflow needs {MLFLOW_SERVER}: set it for the job")
    try:
        _mlflow(recipe).setup()
    except Exception as error:  # of the server, of the way to it, of MLflow
        raise ConfigError(f"{MLFLOW_SERVER} {server}: {one_line(error)[:300]}") from None


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
        loggers.append(Spectator("tensorboard", _tensorboard(Path(folder))))
    if "mlflow" in execution.loggers:
        loggers.append(Spectator("mlflow", _mlflow(recipe)))
    return loggers


class Spectator(LoggerCallback):
    """A logger whose failure must not end a run: it says so once, and logs no more of the sweep."""

    def __init__(self, name: str, logger: LoggerCallback, tell: Callable[[str], None] = say) -> None:
        self._name, self._logger, self._tell = name, logger, tell
        self._failed = False

    def setup(self, *arguments: Any, **info: Any) -> None:
        self._try(lambda: self._logger.setup(*arguments, **info))

    def log_trial_start(self, trial: Any) -> None:
        self._try(lambda: self._logger.log_trial_start(trial))

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        # Tune counts a trial's reports anew in every rung and after every resume; epochs go on.
        steps = {"timesteps_total": result["epoch"] + 1} if "epoch" in result else {}
        self._try(lambda: self._logger.log_trial_result(iteration, trial, result | steps))

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self._try(lambda: self._logger.log_trial_end(trial, failed))

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            reason = f"{type(error).__name__}: {one_line(error)[:300]}"
            self._tell(f"no more is logged to {self._name} in this sweep ({reason}), and the run goes on")


def _mlflow(recipe: Recipe) -> MLflowLoggerCallback:
    name, tags = recipe.experiment.name, {"run_dir": recipe.run_dir}
    return MLflowLoggerCallback(os.environ[MLFLOW_SERVER], experiment_name=name, tags=tags)


def _tensorboard(folder: Path) -> TBXLoggerCallback:
    """Ray's own logger, but for the place: a folder a trial, of the trial's name."""
    logger = TBXLoggerCallback()
    write = logger._summary_writer_cls

    def write_there(trial_folder: str, **options: Any) -> Any:
        return write(str(folder / Path(trial_folder).name), **options)

    logger._summary_writer_cls = write_there
    return logger
