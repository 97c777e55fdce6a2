"""The main job on a real Ray: the same result as in one process; nothing left behind."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.cluster.run import run_compression
from pbd_ray.config import load_recipe
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.storage import Storage
from pbd_ray.search.verify import verify

pytestmark = [pytest.mark.integration, pytest.mark.slow]

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1"}

Start = Callable[[Sequence[str]], Any]


def test_run_dir_on_s3(
    start: Start,
    untrained_teacher: Path,
    tiny_recipe: str,
    video_cache: Path,
    tmp_path: Path,
    s3_uri: Callable[[str], str],
) -> None:
    """Ledger, Tune and Train on S3 with credentials from the environment: the result of a local run_dir."""
    local, run_dir = tmp_path / "local", s3_uri("runs/tiny")
    shorter = [
        f"teacher.source={untrained_teacher}",
        "stopping.max_drops=1",
        "alignment.learning_rates=[1.0e-3]",
    ]
    run_compression(load_recipe(tiny_recipe, [*_overrides(local, video_cache), *shorter, "backend=local"]))
    driver = start(["jobs/compress.py", tiny_recipe, *_overrides(run_dir, video_cache), *shorter])
    log = driver.wait()
    assert driver.process.returncode == 0, log
    driver.assert_nothing_left()
    records = Ledger.existing(run_dir).committed()
    assert [record.result for record in records] == _results(local)
    assert verify(run_dir) == []
    there = Storage.at(run_dir)
    assert there.exists("report.html")
    assert there.names("ray") == (), "the cluster's own files go with the commit"


def test_terminated_leaves_nothing(start: Start, tiny_recipe: str, video_cache: Path, tmp_path: Path) -> None:
    """A Ray that we start listens on loopback only. SIGTERM, as `ray job stop` sends it: exit status 143
    and no process left."""
    run_dir = tmp_path / "run"
    driver = start(["jobs/compress.py", tiny_recipe, *_overrides(run_dir, video_cache)])
    driver.wait_until(lambda: (run_dir / "ray").is_dir() and len(driver.processes()) > 8)
    assert driver.listening() == LOOPBACK
    driver.process.send_signal(signal.SIGTERM)
    log = driver.wait(60)
    assert driver.process.returncode == 143, log
    driver.assert_nothing_left()


def _overrides(run_dir: Path | str, cache: Path) -> list[str]:
    return [f"run_dir={run_dir}", f"cache_dir={cache}"]


def _results(run_dir: Path) -> list[str]:
    folders = [run_dir / "teacher", *sorted((run_dir / "rounds").iterdir())]
    return [json.loads((folder / "commit.json").read_text())["result"] for folder in folders]
