"""`make demo`: a Ray cluster on this machine, one real job submitted to it, and nothing left behind.

    python -m pbd_ray.cluster.demo [--nodes N] [key=value ...]

It does what a user does by hand with `ray start --head` and `ray job submit --working-dir . -- python
jobs/compress.py demo`, follows the job's log, and ends the cluster it started. With `--nodes` the cluster has
so many nodes of one CPU each, all on this machine: to see work spread, and what happens when a node dies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

# Before ray is imported, which reads it: this cluster is for one user, on loopback, for a few minutes.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Else Ray listens on every interface, whatever address it is given: this rules out several machines.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from pbd_ray.cluster.monitoring import exit_status, say
from pbd_ray.config import RunError

T = TypeVar("T")

_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 500_000_000
_START_SECONDS = 120.0


def main(arguments: list[str]) -> int:
    """Run the demo; 0 if its job succeeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parsed = parser.parse_args(arguments)
    nodes, overrides = parsed.nodes, parsed.overrides
    if nodes < 1:
        parser.error(f"--nodes {nodes} is less than 1")
    root = Path.cwd()
    if not (root / "jobs" / "compress.py").is_file():
        print(f"error: {root} has no jobs/compress.py: run the demo from the project's root", file=sys.stderr)
        return 2
    if not any(override.startswith("run_dir=") for override in overrides):
        overrides = [f"run_dir={root / 'runs' / 'demo'}", *overrides]
    if nodes > 1 and not any(override.startswith("max_workers=") for override in overrides):
        overrides = [f"max_workers={nodes}", *overrides]
    command = f"python jobs/compress.py demo {shlex.join(overrides)}"
    with _cluster() if nodes == 1 else _cluster_of(nodes) as address:
        client = _connect(address)
        say(f"ray job submit --working-dir . -- {command}")
        environment = {"working_dir": str(root)}
        job = _soon(lambda: client.submit_job(entrypoint=command, runtime_env=environment))
        asyncio.run(_follow(client, job))
        status = client.get_job_status(job)
    say(f"job {job}: {status}")
    return 0 if status == JobStatus.SUCCEEDED else 1


@contextlib.contextmanager
def _cluster() -> Iterator[str]:
    """`ray start --head` on loopback, on ports of its own beside any other Ray; ended by its process."""
    programs = Path(sys.executable).parent
    port, dashboard_port = _free_port(), _free_port()
    environment = {
        **os.environ,
        # The job runs `python` by name: it must be the one that has pbd_ray's packages.
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        # Nothing runs any more when it ends: without this Ray waits 30 s for its own idle actors to leave.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    with tempfile.TemporaryDirectory(prefix="pbd_ray_", ignore_cleanup_errors=True) as folder:
        options = {
            "node-ip-address": _LOOPBACK,
            "port": port,
            "dashboard-host": _LOOPBACK,
            "dashboard-port": dashboard_port,
            "dashboard-agent-listen-port": 0,
            "object-store-memory": _OBJECT_STORE_BYTES,
            "temp-dir": folder,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        say("starting Ray on this machine")
        with Path(folder, "start.log").open("w") as log:
            head = subprocess.Popen(
                [str(programs / "ray"), "start", "--head", "--block", *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            _await_start(head, dashboard_port, Path(folder, "start.log"))
            yield f"http://{_LOOPBACK}:{dashboard_port}"
        finally:
            head.terminate()
            head.wait()


def _await_start(head: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until somebody listens on the dashboard's port.

    Raises:
        RunError: `ray start` has ended, with its last line; or it takes more than two minutes.
    """
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection((_LOOPBACK, port), timeout=1.0):
            return
        if head.poll() is not None or time.monotonic() > deadline:
            told = log.read_text(errors="replace").strip().splitlines()
            raise RunError(f"Ray does not start: {told[-1] if told else 'it says nothing'}")
        time.sleep(0.5)


@contextlib.contextmanager
def _cluster_of(nodes: int) -> Iterator[str]:
    """Several nodes on loopback, by what Ray tests itself with: `ray start` refuses them there."""
    with tempfile.TemporaryDirectory(prefix="pbd_ray_", ignore_cleanup_errors=True) as folder:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        say(f"starting {nodes} Ray nodes on this machine")
        node: dict[str, Any] = {
            "num_cpus": 1,
            "node_ip_address": _LOOPBACK,
            "object_store_memory": _OBJECT_STORE_BYTES // 2,
            "dashboard_agent_listen_port": 0,  # a port of its own: jobs are run by who listens there
        }
        head = {**node, "include_dashboard": True, "dashboard_port": _free_port(), "temp_dir": folder}
        cluster = Cluster()
        try:
            first: Any = cluster.add_node(**head)
            for number in range(1, nodes):
                # A directory for each: a node deletes the package of a job that has nothing more on it.
                cluster.add_node(**node, temp_dir=f"{folder}/{number}")
            yield f"http://{first.webui_url}"
        finally:
            cluster.shutdown()


def _connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job API, as soon as it answers.

    Raises:
        RuntimeError: not within two minutes.
    """

    def connect() -> JobSubmissionClient:
        client = JobSubmissionClient(address)
        client.list_jobs()
        return client

    client = _soon(connect)
    say(f"dashboard: {address}")
    return client


def _soon(action: Callable[[], T]) -> T:
    """What an action returns once the cluster is up: it answers before the agents that run jobs do."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return action()
        except (ConnectionError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
