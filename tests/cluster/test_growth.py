"""What a launcher writes into the cluster's books, and what the autoscaler says in its events."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

from pbd_ray.cluster import growth

HEAD = NodeGroupConfig(resources={"CPU": 0}, max_count=1)
SMALL = NodeGroupConfig(resources={"CPU": 4}, max_count=3)
GPU = NodeGroupConfig(resources={"CPU": 8, "GPU": 2}, max_count=2)
ENDLESS = NodeGroupConfig(resources={"CPU": 8, "GPU": 1}, max_count=-1)


@pytest.mark.parametrize(
    ("groups", "limits", "need", "expected"),
    [
        (None, {}, {"CPU": 1.0}, None),
        ([], {}, {"CPU": 1.0}, None),
        ([HEAD, SMALL], {}, {"CPU": 3.0}, 3),
        ([HEAD, SMALL], {}, {"CPU": 5.0}, 0),
        ([HEAD, SMALL], {}, {"CPU": 1.0, "GPU": 1.0}, 0),
        ([SMALL, GPU], {}, {"CPU": 0.5}, 3 * 8 + 2 * 16),
        ([SMALL, GPU], {}, {"CPU": 7.0, "GPU": 1.0}, 2),
        ([SMALL, GPU], {"GPU": 3}, {"CPU": 1.0, "GPU": 1.0}, 3),
        ([SMALL, ENDLESS], {"CPU": 100}, {"CPU": 7.0, "GPU": 1.0}, 14),
    ],
)
def test_most_workers(
    monkeypatch: pytest.MonkeyPatch,
    groups: list[NodeGroupConfig] | None,
    limits: dict[str, int],
    need: dict[str, float],
    expected: int | None,
) -> None:
    config = None if groups is None else ClusterConfig(node_group_configs=groups, max_resources=limits)
    monkeypatch.setattr(growth.state, "get_cluster_config", lambda: config)
    assert growth.most_workers(need) == expected


NEED = {"CPU": 7.0, "GPU": 1.0}
V1 = (
    "Error: No available node types can fulfill resource request {'CPU': 7.0, 'GPU': 1.0}. "
    "Add suitable node types to this cluster to resolve this issue."
)
V2 = V1.removeprefix("Error: ").replace(
    "request {'CPU': 7.0, 'GPU': 1.0}", "requests {'CPU': 7.0, 'GPU': 1.0}*1"
)


@pytest.mark.parametrize(
    ("message", "seconds_ago", "expected"),
    [
        (V1, 0, True),
        (V2, 0, True),
        (V1, 60, False),
        (V1.replace("7.0", "17.0"), 0, False),
        (V1.replace(", 'GPU': 1.0", ""), 0, False),
        ("Resized to 7.0 CPUs.", 0, False),
    ],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, message: str, seconds_ago: int, expected: bool) -> None:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - seconds_ago))
    events: list[Any] = [{"message": message, "time": moment}]
    monkeypatch.setattr(growth, "list_cluster_events", lambda *_, **__: events)
    monkeypatch.setattr(growth.ray, "get_runtime_context", lambda: type("Here", (), {"gcs_address": "x"}))
    assert growth.refused(NEED, time.time() - 5) is expected
