"""Where Tune's trials are logged to, and what is refused before anything starts."""

from __future__ import annotations

import struct
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ray.tune.logger import JsonLoggerCallback, LoggerCallback
from tensorboardX.proto.event_pb2 import Event

from pbd_ray.cluster.loggers import Spectator, require_loggers, tune_loggers
from pbd_ray.config import ConfigError, load_recipe


class Trial:
    """What a logger asks of a Tune trial."""

    def __init__(self, staging: Path) -> None:
        self.evaluated_params = {"block": 3}
        self.local_path = str(staging / "round-01-scores-block-03")

    def init_local_path(self) -> None:
        pass


@pytest.mark.parametrize("elsewhere", [None, "logs"])
def test_tensorboard_lies_beside_the_files_of_ray(
    elsewhere: str | None, tiny_recipe: str, tmp_path: Path
) -> None:
    place = tmp_path / (elsewhere or "run/tensorboard")
    given = [] if elsewhere is None else [f"tensorboard_dir={place}"]
    recipe = load_recipe(tiny_recipe, ["loggers=[tensorboard]", *given])
    always, logger = tune_loggers(recipe, str(tmp_path / "run" / "ray"))
    assert isinstance(always, JsonLoggerCallback) and isinstance(logger, LoggerCallback)
    trial = Trial(tmp_path / "staging")
    for step, fraction in ((1, 0.5), (2, 1.0)):
        logger.log_trial_result(step, trial, {"training_iteration": step, "fraction": fraction})
    # An epoch is its own step: the second sweep over the same trial counts its reports anew.
    logger.log_trial_result(1, trial, {"training_iteration": 1, "epoch": 6, "fraction": 0.25})
    logger.log_trial_end(trial)
    assert not (tmp_path / "staging").exists()
    (file,) = (place / "round-01-scores-block-03").iterdir()
    assert scalars(file.read_bytes(), "ray/tune/fraction") == [(1, 0.5), (2, 1.0), (7, 0.25)]


def test_a_logger_that_fails_ends_no_run(tmp_path: Path) -> None:
    asked: list[str] = []

    class Broken(LoggerCallback):
        def log_trial_start(self, trial: Trial) -> None:
            asked.append("start")

        def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
            asked.append("result")
            raise ConnectionError("the server\nis gone")

    said: list[str] = []
    logger, trial = Spectator("mlflow", Broken(), said.append), Trial(tmp_path)
    logger.on_trial_start(0, [], trial)
    logger.on_trial_result(1, [], trial, {})
    logger.on_trial_result(2, [], trial, {})
    logger.on_trial_complete(2, [], trial)
    assert asked == ["start", "result"]
    assert said == [
        "no more is logged to mlflow in this sweep (ConnectionError: the server is gone), and the run goes on"
    ]


def scalars(content: bytes, tag: str) -> list[tuple[int, float]]:
    """(step, value) in a file of TFRecords: length (8 bytes) and its checksum (4), Event and its own (4)."""
    found, place = [], 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        event = Event.FromString(content[place + 12 : place + 12 + length])
        found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
        place += length + 16
    return found


@pytest.mark.parametrize(
    ("logger", "missing", "line"),
    [
        (
            "tensorboard",
            "tensorboardX",
            "tensorboard needs the package tensorboardX: pip install tens",
        ),
        ("mlflow", "mlflow", "mlflow needs the package mlflow-skinny: pip install mlflow-skinny"),
    ],
)
def test_a_package_that_is_missing(
    logger: str, missing: str, line: str, tiny_recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError) as error:
        require_loggers(load_recipe(tiny_recipe, [f"loggers=[{logger}]"]))
    assert str(error.value).startswith(f"execution.loggers: {line}")


def test_mlflow_without_its_server(tiny_recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = ModuleType("mlflow")
    there.__spec__ = ModuleSpec("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", there)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="mlflow needs MLFLOW_TRACKING_URI: set it for the job"):
        require_loggers(load_recipe(tiny_recipe, ["loggers=[mlflow]"]))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["loggers=[wandb]"], "execution.loggers.0: Input should be 'tensorboard' or 'mlflow', got 'wandb'"),
        (
            ["loggers=[mlflow]", "backend=local"],
            "execution.loggers are Ray Tune's: execution.backend must",
        ),
        (
            ["loggers=[tensorboard]", "run_dir=s3://bucket/run"],
            "execution.loggers tensorboard needs execution.tensorboard_dir where run_dir is a URI, got s3://buc",
        ),
    ],
)
def test_recipes_that_are_refused(overrides: list[str], line: str, tiny_recipe: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(tiny_recipe, overrides)
    assert line in str(error.value)
