"""`make demo`: a Ray cluster on this machine, one real job submitted to it, and nothing left behind.

    python -m pbd_ray.cluster.demo [key=value ...]

It does what a user does by hand with `ray start --head` and `ray job submit --working-dir . -- python
jobs/compress.py demo`, follows the job's log, and ends the cluster it started.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

# Before ray is imported, which reads it: this cluster is for one user, on loopback, for a few minutes.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from pbd_ray.cluster.monitoring import say

_OBJECT_STORE_BYTES = 500_000_000
_AGENT_SECONDS = 60.0


def main(overrides: list[str]) -> int:
    """Run the demo; 0 if its job succeeded."""
    root = Path.cwd()
    if not (root / "jobs" / "compress.py").is_file():
        print(f"error: {root} has no jobs/compress.py: run the demo from the project's root", file=sys.stderr)
        return 2
    if not any(override.startswith("run_dir=") for override in overrides):
        overrides = [f"run_dir={root / 'runs' / 'demo'}", *overrides]
    # The job runs `python` by name: it must be the one that has pbd_ray's packages.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    say("starting Ray on this machine")
    with tempfile.TemporaryDirectory(prefix="pbd_ray_") as folder:
        context = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
        try:
            address = f"http://{context.dashboard_url}"
            say(f"dashboard: {address}")
            return _run(JobSubmissionClient(address), root, overrides)
        finally:
            ray.shutdown()


def _run(client: JobSubmissionClient, root: Path, overrides: list[str]) -> int:
    command = f"python jobs/compress.py demo {shlex.join(overrides)}"
    say(f"ray job submit --working-dir . -- {command}")
    job = _submit(client, command, root)
    asyncio.run(_follow(client, job))
    status = client.get_job_status(job)
    say(f"job {job}: {status}")
    return 0 if status == JobStatus.SUCCEEDED else 1


def _submit(client: JobSubmissionClient, command: str, root: Path) -> str:
    """Submit, waiting for the cluster's job agent, which comes up some seconds after the cluster."""
    deadline = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            job: str = client.submit_job(entrypoint=command, runtime_env={"working_dir": str(root)})
            return job
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
