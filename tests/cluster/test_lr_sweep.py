"""What a Tune trial's end means, and where Ray's files go; no Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow import fs
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from pbd_ray.cluster.lr_sweep import AlignmentFailed, _reported
from pbd_ray.cluster.lr_trial import _backend, failure_reason
from pbd_ray.cluster.ray_storage import ray_storage
from pbd_ray.config import Execution
from pbd_ray.search.rate_search import GridRate


def ended(failed: str | None = None, diverged: str | None = None) -> SimpleNamespace:
    """What Tune says of a learning rate whose trainer gave up, or whose loss was not finite."""
    return SimpleNamespace(
        error=None, metrics={"last_checkpoint": None, "diverged": diverged, "failed": failed}
    )


def lost(error: str) -> SimpleNamespace:
    """What Tune says of a trial whose process died more often than allowed."""
    return SimpleNamespace(error=RuntimeError(error), metrics=None)


@pytest.mark.parametrize(
    ("result", "reason"),
    [(ended("CUDA\nout of memory"), "CUDA out of memory"), (lost("The actor died"), "The actor died")],
)
def test_a_run_that_failed_is_not_a_learning_rate_that_lost(result: SimpleNamespace, reason: str) -> None:
    """Whatever it was, the next start may do without it, and would then choose another learning rate."""
    with pytest.raises(AlignmentFailed) as raised:
        _reported(GridRate(2, 1e-4), result)
    assert str(raised.value) == f"learning rate 0.0001: {reason}; the same command goes on from here"


TRACEBACK = (
    'Traceback (most recent call last):\n  File "a.py", line 1\nOSError: AWS Error NETWORK_CONNECTION\n'
)
OURS = UserExceptionWithTraceback(OSError("AWS Error NETWORK_CONNECTION"), TRACEBACK)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            WorkerGroupError("two of them", {1: OURS, 3: OURS}),
            "training worker 1: OSError: AWS Error NETWORK_",
        ),
        (
            WorkerGroupError("one", {0: WorkerHealthCheckFailedError("lost", failure=ActorDiedError())}),
            "training worker 0: The actor died unexpectedly before finishing this task.",
        ),
        (ControllerError(RuntimeError("no place")), "no place"),
    ],
)
def test_reason_of_a_failure(error: TrainingFailedError, reason: str) -> None:
    assert failure_reason(error).startswith(reason)
    assert "\n" not in failure_reason(error)


def test_a_run_that_diverged_is_reported() -> None:
    metrics = _reported(GridRate(0, 1e-3), ended(diverged="loss nan at step 3"))
    assert metrics["diverged"] == "loss nan at step 3"


@pytest.mark.parametrize(
    ("gpus", "workers", "backend"),
    [(0, 1, None), (0, 4, None), (1, 4, None), (0.5, 1, None), (0.5, 2, "gloo")],
)
def test_ranks_that_share_a_gpu_do_not_speak_nccl(gpus: float, workers: int, backend: str | None) -> None:
    assert _backend(Execution(gpus_per_worker=gpus, train_workers=workers)) == backend


def test_storage_of_ray(tmp_path: Path, s3_uri: Callable[[str], str]) -> None:
    assert ray_storage(str(tmp_path)) == {"storage_path": str(tmp_path)}
    location = s3_uri("run/ray")
    remote = ray_storage(location)
    assert remote["storage_path"] == location.removeprefix("s3://").partition("?")[0]
    assert isinstance(remote["storage_filesystem"], fs.S3FileSystem)
