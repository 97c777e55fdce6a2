"""What Ray knows of the drivers of a run directory, beside the records in the directory itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayActorError, RayError
from ray.job_submission import JobSubmissionClient

from pbd_ray.cluster.session import HEAD_RESOURCE
from pbd_ray.search.storage import LedgerError

_NAMESPACE = "pbd_ray"
_BURIAL_SECONDS = 10.0
"""Within this time Ray removes the actors of a driver that was killed."""


def submission_id() -> str | None:
    """Of the Ray job that this process was submitted as."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    found: str | None = config.get("metadata", {}).get("job_submission_id")
    return found


def job_finished(address: str | None) -> Callable[[str], bool | None]:
    """A function that asks the cluster at an address whether a submitted job has ended.

    It says None for a job that the cluster does not know, or when no cluster answers.
    """

    def ask(job: str) -> bool | None:
        try:
            return JobSubmissionClient(address).get_job_status(job).is_terminal()
        except (RuntimeError, OSError, ValueError, RayError):
            return None

    return ask


class _Holder:
    def __init__(self, who: str) -> None:
        self._who = who

    def who(self) -> str:
        return self._who


@contextlib.contextmanager
def sole_driver(location: str, who: str) -> Iterator[None]:
    """Hold a location against the cluster's other drivers: an actor of that name, which ends with its driver.

    Args:
        who: this driver, for the others' error.

    Raises:
        LedgerError: another driver of this cluster holds it.
    """
    name = f"driver-of-{hashlib.sha256(location.encode()).hexdigest()[:16]}"
    actor: Any = ray.remote(_Holder).options(
        name=name, namespace=_NAMESPACE, num_cpus=0, resources={HEAD_RESOURCE: 0.001}, max_restarts=-1
    )
    deadline = time.monotonic() + _BURIAL_SECONDS
    while True:
        try:
            holder: Any = actor.remote(who)
            break
        except ActorAlreadyExistsError:
            other = _who_holds(name)
            if other is not None and time.monotonic() > deadline:
                raise LedgerError(f"{location} is held by {other}") from None
            time.sleep(0.5)
    try:
        ray.get(holder.who.remote())
        yield
    finally:
        ray.kill(holder)


def _who_holds(name: str) -> str | None:
    """What the actor of a name says of its driver; None where it has just ended."""
    try:
        holder: Any = ray.get_actor(name, _NAMESPACE)
        return str(ray.get(holder.who.remote(), timeout=_BURIAL_SECONDS))
    except GetTimeoutError:
        return "a driver whose actor does not answer"
    except (ValueError, RayActorError):
        return None
