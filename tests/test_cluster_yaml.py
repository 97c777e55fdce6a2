"""cluster.yaml, checked offline against Ray's own schema and against the rest of the project."""

from __future__ import annotations

import copy
import re
import socket
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from pbd_ray.config import load_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return loaded


def commands(config: dict[str, Any], prefix: str) -> list[str]:
    return [c for c in config[f"{prefix}_start_ray_commands"] if c.startswith("ray start")]


def test_ray_accepts_it(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the check must not reach for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(ROOT)  # file_mounts are relative to where `ray up` is called
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types["head"]["max_workers"] == 0
    assert types["gpu_worker"]["min_workers"] == 0
    assert prepared["head_setup_commands"][0] == config["setup_commands"][0]
    assert prepared["worker_setup_commands"] == config["setup_commands"]


def test_ray_refuses_what_it_does_not_know(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above has teeth."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(ROOT)
    prepared = prepare_config(copy.deepcopy(config) | {"idle_timeout": 3})
    with pytest.raises(ValidationError, match="idle_timeout"):
        validate_config(prepared)


def test_head_never_computes(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"], "a spot head may vanish with the driver"


def test_workers_come_and_go(config: dict[str, Any]) -> None:
    worker = config["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0
    assert worker["max_workers"] == config["max_workers"] > 0
    assert worker["resources"]["GPU"] == 1
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert 0 < config["idle_timeout_minutes"] <= 30


def test_images_are_pinned_to_the_ray_and_python_of_the_project(config: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = (d for d in project["dependencies"] if d.startswith("ray["))
    lower, upper = re.findall(r"[<>]=?(\d+)\.(\d+)", requirement)
    assert int(upper[1]) == int(lower[1]) + 1, "the project pins one minor version of Ray"
    for key in ("image", "head_image"):
        match = re.fullmatch(r"rayproject/ray:(\d+)\.(\d+)\.\d+-py(\d)(\d+)(-gpu)?", config["docker"][key])
        assert match, config["docker"][key]
        assert match.groups()[:2] == lower
        assert (int(match[3]), int(match[4])) == sys.version_info[:2]
    assert config["docker"]["image"].endswith("-gpu")


def test_every_node_asks_for_the_token(config: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert not {"head_run_options", "worker_run_options"} & config["docker"].keys()
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_dashboard_stays_on_the_head(config: dict[str, Any]) -> None:
    (start,) = commands(config, "head")
    assert "--dashboard-host=127.0.0.1" in start
    assert "--disable-usage-stats" in start
    assert "--env RAY_USAGE_STATS_ENABLED=0" in config["docker"]["run_options"]
    assert "ProviderConfig" not in config and "security_group" not in config["provider"]
    (join,) = commands(config, "worker")
    assert "--address=$RAY_HEAD_IP:6379" in join
    assert not re.search(r"(?m)0\.0\.0\.0", (ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def test_nodes_install_what_is_mounted(config: dict[str, Any]) -> None:
    target = "/home/ray/pbd_ray"
    assert any(c.endswith(f"--editable {target}") for c in config["setup_commands"])
    mounted = {k: v for k, v in config["file_mounts"].items() if k.startswith(f"{target}/")}
    assert set(mounted) == {f"{target}/{v}" for v in mounted.values()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"pyproject.toml", "pbd_ray", project["readme"]} <= set(mounted.values())
    for local in mounted.values():
        assert (ROOT / local).exists(), local


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if n != "demo"])
def test_shipped_recipes_fit_its_workers(config: dict[str, Any], name: str) -> None:
    execution = load_recipe(name).execution
    worker = config["available_node_types"]["gpu_worker"]
    assert execution.gpus_per_worker <= worker["resources"]["GPU"]
    assert execution.cpus_per_worker <= worker["resources"]["CPU"]
    assert execution.max_workers <= worker["max_workers"]
    assert execution.train_workers * (execution.max_concurrent_learning_rates or 1) <= worker["max_workers"]
