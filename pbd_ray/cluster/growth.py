"""What a cluster can become: how far its autoscaler goes, as far as that can be known.

Some launchers (KubeRay, Anyscale) put the most that they bring into the cluster's books. The others do not:
there the autoscaler is asked by a task that waits for what is needed, and says so in the cluster's events
where no type of node has it. It judges single nodes only, not how many of them may come.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.util.state import list_cluster_events
from ray.util.state.exception import RayStateApiException

_INFEASIBLE = "No available node types can fulfill resource request"
_UNLIMITED = -1


def most_workers(need: Mapping[str, float]) -> int | None:
    """How often what is needed fits the largest cluster there may be, each on one node; None: not known."""
    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    total = 0
    for group in config.node_group_configs:
        count = sys.maxsize if group.max_count == _UNLIMITED else group.max_count
        total += count * min(_times(group.resources, name, amount) for name, amount in need.items())
    limits = [_times(config.max_resources, name, need[name]) for name in need if name in config.max_resources]
    return min(total, *limits) if limits else total


def _times(resources: Mapping[str, int], name: str, amount: float) -> int:
    there = resources.get(name, 0)
    return sys.maxsize if there == _UNLIMITED else int(there // amount)


@contextlib.contextmanager
def asking(need: Mapping[str, float]) -> Iterator[None]:
    """A task that asks the autoscaler for what is needed, as long as the context lasts."""
    task: Any = ray.remote(_nothing).options(num_cpus=need["CPU"], num_gpus=need.get("GPU", 0), max_retries=0)
    waiting = task.remote()
    try:
        yield
    finally:
        ray.cancel(waiting, force=True)


def refused(need: Mapping[str, float], since: float) -> bool:
    """Whether the autoscaler has said that no type of node has what is needed.

    Args:
        since: seconds of `time.time()`; what it said before counts for nothing.
    """
    asked = {f"{name}: {float(amount)}" for name, amount in need.items()}
    address = ray.get_runtime_context().gcs_address
    try:
        events = list_cluster_events(address, limit=1000, raise_on_missing_output=False)
    except RayStateApiException:  # the dashboard does not answer: then the deadline decides
        return False
    for event in events:
        said = event["message"].replace("'", "")
        if _INFEASIBLE in said and all(item in said for item in asked) and _moment(event["time"]) >= since:
            return True
    return False


def _moment(text: str) -> float:
    """An event's time, in whole seconds of the clock of the head."""
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S")) + 1


def _nothing() -> None:
    """Being placed is all it is for."""
