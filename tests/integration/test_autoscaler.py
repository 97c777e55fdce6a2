"""A cluster that grows: Ray's own autoscaler with its fake provider, whose nodes are processes here."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CLUSTER: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 1,
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode",
        "disable_launch_config_check": True,
        "disable_node_updaters": True,
    },
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "large": {"resources": {"CPU": 3}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    },
    **{
        f"{part}_commands": []
        for part in (
            "initialization",
            "setup",
            "head_setup",
            "worker_setup",
            "head_start_ray",
            "worker_start_ray",
        )
    },
}


DRIVER = """
import sys
import ray
from pbd_ray.cluster.monitoring import exit_status
from pbd_ray.cluster.session import ray_session
from pbd_ray.config import Execution

def main():
    with ray_session(Execution(cpus_per_worker={cpus}, ray_address="{address}"), print):
        print("largest node", max(node["Resources"].get("CPU", 0) for node in ray.nodes()))

sys.exit(exit_status(main))
"""


def test_a_node_comes_when_the_recipe_needs_one(start: Callable[..., Any], tmp_path: Path) -> None:
    """The head has 1 CPU and a worker wants 3: the session asks for a node and waits for it. None has 5."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {**CLUSTER, "provider": {**CLUSTER["provider"], "gcs_address": address}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(config))
    options = {
        "port": address.split(":")[1],
        "num-cpus": 1,
        "node-ip-address": "127.0.0.1",
        "dashboard-port": 0,
        "object-store-memory": 200_000_000,
        "autoscaling-config": tmp_path / "cluster.yaml",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    head = start(
        ["-m", "ray.scripts.scripts", "start", "--head", "--block", *arguments], RAY_FAKE_CLUSTER="1"
    )
    head.wait_until(lambda: "Ray runtime started" in head.log.read_text(), 60)
    never = start(["-c", DRIVER.format(address=address, cpus=5)])
    log = never.wait(60)
    assert never.process.returncode == 2, log
    assert (
        "error: execution asks for 5 CPU a worker (cpus_per_worker, gpus_per_worker) "
        "but no type of node of its autoscaler has it\n"
    ) in log
    driver = start(["-c", DRIVER.format(address=address, cpus=3)])
    log = driver.wait(200)
    assert driver.process.returncode == 0, log
    assert "waiting for 1 workers of 3 CPU, room for 0 is there" in log
    assert "largest node 3.0" in log
