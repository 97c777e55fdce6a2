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


@pytest.fixture(scope="module")
def in_process(tiny_recipe: str, video_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same recipe, run in this process without Ray."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    run_compression(load_recipe(tiny_recipe, [*_overrides(run_dir, video_cache), "backend=local"]))
    return run_dir


def test_run_dir_on_s3(
    start: Start,
    in_process: Path,
    tiny_recipe: str,
    video_cache: Path,
    tmp_path: Path,
    s3_uri: Callable[[str], str],
) -> None:
    """Ledger, Tune and Train on S3 with credentials from the environment: the result of a local run_dir."""
    local, run_dir = tmp_path / "local", s3_uri("runs/tiny")
    shorter = [f"teacher.source={in_process / 'teacher'}", "stopping.max_drops=1"]
    shorter.append("alignment.learning_rates=[1.0e-3]")
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


def test_submitted_job(start: Start, video_cache: Path, tmp_path: Path) -> None:
    """`make demo` on fewer videos and two training workers a learning rate: a real job, candidates and
    learning rates as Tune trials, a table."""
    run_dir = tmp_path / "run"
    trials: set[str] = set()
    listening: set[str] = set()

    def finished() -> bool:
        if trials and not listening:
            listening.update(driver.listening())
        for sweeps in ("ray", "ray/*"):  # over candidates, over learning rates
            trials.update(path.parent.name for path in run_dir.glob(f"{sweeps}/*-tune/*/result.json"))
        return (run_dir / "frontier.parquet").is_file()

    small = [
        "experiment.data.synthetic.fit_videos=6",
        "experiment.data.synthetic.selection_videos=3",
        "experiment.data.synthetic.test_videos=4",
        "experiment.alignment.optimizer.epochs=1",
        "experiment.alignment.optimizer.schedule_epochs=1",
        "experiment.alignment.learning_rates=[1e-4,1e-3]",
        "experiment.stopping.max_drops=1",
        "execution.train_workers=2",
    ]
    driver = start(["-m", "pbd_ray.cluster.demo", *_overrides(run_dir, video_cache), *small])
    driver.wait_until(finished, 500)
    log = driver.wait(60)
    assert driver.process.returncode == 0, log
    driver.assert_nothing_left()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [len(entry["kept_blocks"]) for entry in summary["rounds"]] == [7]
    assert summary["rounds"][0]["lr"] in (1e-4, 1e-3)
    assert set(summary["rounds"][0]["scores"]) == {str(block) for block in range(8)}
    assert {f"round-01-scores-block-{block:02d}" for block in range(8)} <= trials
    assert sum("-lr-" in name for name in trials) == 2
    assert listening == LOOPBACK
    assert "ray job submit --working-dir . -- python jobs/compress.py demo" in log
    assert "drop block" in log
    assert "mAP@0.5 - teacher (interval)" in log
    assert "SUCCEEDED" in log


def _overrides(run_dir: Path | str, cache: Path) -> list[str]:
    return [f"run_dir={run_dir}", f"cache_dir={cache}"]


def _results(run_dir: Path) -> list[str]:
    folders = [run_dir / "teacher", *sorted((run_dir / "rounds").iterdir())]
    return [json.loads((folder / "commit.json").read_text())["result"] for folder in folders]
