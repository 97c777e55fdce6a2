"""Joining a Ray cluster, and leaving it so that nothing of ours stays behind.

Inside a submitted job the working directory already carries `pbd_ray` to every worker; a plain
`python jobs/compress.py` against an existing cluster ships the package by itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray._private import ray_constants
from ray.autoscaler._private.util import format_readonly_node_type
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_placement_groups

import pbd_ray
from pbd_ray.cluster.growth import asking, most_workers, refused
from pbd_ray.cluster.monitoring import throttled
from pbd_ray.cluster.output import inside_job
from pbd_ray.config import Execution, UserError

# Read by Ray Tune and by Ray Train's controller. A fit starts and ends some 10 s sooner than with Ray's
# defaults, which poll every few seconds; a user's own values win.
_WORKER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # `cluster/loggers.py` says which files a trial writes
    "TUNE_WARN_THRESHOLD_S": "10",
}
_LOCAL_OBJECT_STORE_BYTES = 500_000_000
_WAIT_LINE_SECONDS, _WAIT_POLL_SECONDS = 30.0, 1.0
_FIRST_REPORT_SECONDS = 30.0
HEAD_RESOURCE = "node:__internal_head__"


class ResourcesError(UserError):
    """The cluster cannot ever give what the recipe asks for, or did not within the deadline."""


@contextlib.contextmanager
def ray_session(execution: Execution, say: Callable[[str], None], workers: int = 1) -> Iterator[None]:
    """Connect to the cluster, hold it, and shut down what was started here.

    Args:
        workers: how many the cluster must hold at once: `train_workers` where something is trained.

    Raises:
        ResourcesError: the cluster would never hold them.
    """
    environment = {key: os.environ.get(key, value) for key, value in _WORKER_ENVIRONMENT.items()}
    os.environ.update(environment)
    runtime_env: dict[str, Any] = {"env_vars": environment}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    shared = inside_job() or execution.ray_address is not None
    if shared:
        options["address"] = execution.ray_address or "auto"
    else:
        # Tune over Train frees the placement groups of ended trials through the dashboard's API.
        options.update(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        )
    if not inside_job():
        runtime_env["py_modules"] = [str(Path(pbd_ray.__file__).parent)]
    with contextlib.nullcontext() if shared else _on_loopback():
        ray.init(runtime_env=runtime_env, **options)
    try:
        with sigterm_as_interrupt():  # anew: ray.init has set a handler of its own
            if shared:
                _remove_orphaned_placement_groups()
            require_resources(execution, say, workers)
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started meanwhile listens on loopback only.

    Else it listens on every interface of the machine, and whoever reaches its ports can run code. It takes
    127.0.0.1 as an address only where it believes that clusters of several nodes are not supported.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def require_resources(execution: Execution, say: Callable[[str], None], workers: int) -> None:
    """Wait until the nodes hold so many workers at once, at most `resource_wait_seconds`.

    Raises:
        ResourcesError: they do not and, as far as Ray knows, never will.
    """
    need = worker_resources(execution)
    if _room(need) >= workers:
        return
    first_report = time.monotonic() + _FIRST_REPORT_SECONDS
    while not _node_types() and time.monotonic() < first_report:
        time.sleep(_WAIT_POLL_SECONDS)  # of a head that has just started nobody knows yet whether it can grow
    if not autoscaler_runs():
        raise ResourcesError(f"{_asks(execution, workers)} {_has(need)}")
    most = most_workers(need)
    if most is not None and most < workers:
        raise ResourcesError(f"{_asks(execution, workers)} its autoscaler brings {most} at most")
    shown, start = _shown(need), time.time()
    deadline = time.monotonic() + execution.resource_wait_seconds
    tell = throttled(_WAIT_LINE_SECONDS, say)
    request_resources(bundles=[need] * workers)  # nothing else asks yet, and unasked no node comes
    try:
        with asking(need):
            while (there := _room(need)) < workers:
                if not there and refused(need, start):
                    raise ResourcesError(
                        f"{_asks(execution, workers)} no type of node of its autoscaler has it"
                    )
                if time.monotonic() > deadline:
                    raise ResourcesError(
                        f"{there} of {workers} workers of {shown} came within "
                        f"execution.resource_wait_seconds={execution.resource_wait_seconds:g}"
                    )
                tell(f"waiting for {workers} workers of {shown}, room for {there} is there")
                time.sleep(_WAIT_POLL_SECONDS)
    finally:
        request_resources(bundles=[])


def _asks(execution: Execution, workers: int) -> str:
    gang = f"{workers} workers at once (train_workers), " if workers > 1 else ""
    shown = _shown(worker_resources(execution))
    return f"execution asks for {gang}{shown} a worker (cpus_per_worker, gpus_per_worker) but"


def _shown(need: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in need.items())


def _has(need: Mapping[str, float]) -> str:
    room = _room(need)
    if room:
        return f"the nodes of the cluster hold {room}"
    return f"no node of the cluster has it: {_largest_node()}"


def worker_resources(execution: Execution) -> dict[str, float]:
    """What one scoring or training worker reserves."""
    need = {"CPU": float(execution.cpus_per_worker)}
    if execution.gpus_per_worker:
        need["GPU"] = execution.gpus_per_worker
    return need


def worker_capacity(execution: Execution) -> int:
    """How many workers to ask for: as many as fit the nodes there are, at least one; where an autoscaler
    may bring more, `max_workers`."""
    if autoscaler_runs():
        return execution.max_workers
    return max(1, _room(worker_resources(execution)))


def holds(node: Mapping[str, Any], need: Mapping[str, float]) -> int:
    """How many times a node has what is needed, whatever else it is busy with."""
    return min(int(node["Resources"].get(name, 0.0) // amount) for name, amount in need.items())


def _room(need: Mapping[str, float]) -> int:
    """How many times the nodes that are alive have what is needed, each times on one node."""
    return sum(holds(node, need) for node in ray.nodes() if node["Alive"])


def _largest_node() -> str:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    return f"at most {cpus:g} CPU and {gpus:g} GPU on one node"


def autoscaler_runs() -> bool:
    """Whether more nodes may come.

    Ray runs its autoscaler everywhere; where nobody configured node types for it, it only looks on, and
    calls every node a type of its own, `node_<id>`.
    """
    return not _node_types() <= {format_readonly_node_type(node["NodeID"]) for node in ray.nodes()}


def _node_types() -> set[str]:
    """Types of the nodes in the autoscaler's report; empty before its first, some seconds after the head."""
    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return {node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)}
    written = _internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS.encode())
    report = (json.loads(written) if written else {}).get("autoscaler_report") or {}
    return {*report.get("active_nodes", ()), *report.get("pending_launches", ())}


def _remove_orphaned_placement_groups() -> None:
    """A driver killed while Train waited for its workers leaves placement groups that starve the next job."""
    address = ray.get_runtime_context().gcs_address
    dead = {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]}
    for group in list_placement_groups(address, limit=1000, raise_on_missing_output=False):
        if group.creator_job_id in dead and group.state != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group.placement_group_id)))


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """`ray job stop` sends SIGTERM; only an interrupt lets Tune and Train give their resources back.

    The process then exits with 143, as one ended by SIGTERM does.
    """
    terminated = False

    def handler(signum: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in what a script starts with &
            signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except BaseException:
        if terminated:
            sys.exit(143)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
