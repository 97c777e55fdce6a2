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


def failed(error: str) -> SimpleNamespace:
    return SimpleNamespace(config={"grid": (0, 1e-4)}, error=RuntimeError(error), metrics={})


def test_a_run_whose_storage_failed_is_not_a_learning_rate_that_lost() -> None:
    error = failed('Traceback\n  File "pyarrow/error.pxi", line 92\nOSError: AWS Error NETWORK_CONNECTION')
    with pytest.raises(StorageError) as raised:
        _choose(None, [error], "", lambda line: None)
    assert str(raised.value).startswith("learning rate 0.0001: Traceback")
    assert str(raised.value).endswith("AWS Error NETWORK_CONNECTION; the same command goes on from here")


def test_runs_that_all_failed_otherwise() -> None:
    said: list[str] = []
    with pytest.raises(AlignmentFailed, match="out of memory"):
        _choose(None, [failed("out of memory")], "", said.append)
    assert said == ["learning rate 0.0001: out of memory"]


def test_storage_of_ray(tmp_path: Path, s3_uri: Callable[[str], str]) -> None:
    assert ray_storage(str(tmp_path)) == {"storage_path": str(tmp_path)}
    location = s3_uri("run/ray")
    remote = ray_storage(location)
    assert remote["storage_path"] == location.removeprefix("s3://").partition("?")[0]
    assert isinstance(remote["storage_filesystem"], fs.S3FileSystem)
