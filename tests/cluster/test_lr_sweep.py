"""What the learning-rate grid makes of runs that failed, and where Ray's files go; no Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow import fs

from pbd_ray.cluster.lr_sweep import AlignmentFailed, _choose
from pbd_ray.cluster.ray_storage import ray_storage
from pbd_ray.search.patience import StorageError


def run(failed: str | None = None, diverged: str | None = None) -> SimpleNamespace:
    """What Tune says of a learning rate whose trainer gave up, or whose loss was not finite."""
    metrics = {"last_checkpoint": None, "diverged": diverged, "failed": failed}
    return SimpleNamespace(config={"grid": (0, 1e-4)}, error=None, metrics=metrics)


def lost(error: str) -> SimpleNamespace:
    """What Tune says of a trial whose process died more often than allowed."""
    return SimpleNamespace(config={"grid": (1, 1e-3)}, error=RuntimeError(error), metrics={})


STORAGE = 'Traceback\n  File "pyarrow/error.pxi", line 92\nOSError: AWS Error NETWORK_CONNECTION'


@pytest.mark.parametrize(
    ("result", "error", "start", "end"),
    [
        (run(STORAGE), StorageError, "learning rate 0.0001: Traceback", "AWS Error NETWORK_CONNECTION"),
        (lost(STORAGE), StorageError, "learning rate 0.001: Traceback", "AWS Error NETWORK_CONNECTION"),
        (run("CUDA\nout of memory"), AlignmentFailed, "learning rate 0.0001: CUDA out", "of memory"),
        (lost("The actor died"), AlignmentFailed, "learning rate 0.001: The actor", "died"),
    ],
)
def test_a_run_that_failed_is_not_a_learning_rate_that_lost(
    result: SimpleNamespace, error: type[Exception], start: str, end: str
) -> None:
    """Whatever the other learning rates did: with all of them the choice might be another."""
    with pytest.raises(error) as raised:
        _choose(None, [run(diverged="loss is nan"), result], "", lambda line: None)
    assert str(raised.value).startswith(start)
    assert str(raised.value).endswith(f"{end}; the same command goes on from here")


def test_runs_that_all_diverged() -> None:
    said: list[str] = []
    with pytest.raises(AlignmentFailed, match=r"ended well: learning rate 0\.0001: loss is nan$"):
        _choose(None, [run(diverged="loss is nan")], "", said.append)
    assert said == ["learning rate 0.0001: loss is nan"]


def test_storage_of_ray(tmp_path: Path, s3_uri: Callable[[str], str]) -> None:
    assert ray_storage(str(tmp_path)) == {"storage_path": str(tmp_path)}
    location = s3_uri("run/ray")
    remote = ray_storage(location)
    assert remote["storage_path"] == location.removeprefix("s3://").partition("?")[0]
    assert isinstance(remote["storage_filesystem"], fs.S3FileSystem)
