"""The demo on two nodes, small: a job on a cluster of its own, and all that a person can watch of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.cluster.metrics_export import METRICS, Counter

pytestmark = [pytest.mark.integration, pytest.mark.slow]

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1"}
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"
REPORT_MS = 1000
"""Ray tells its metrics so often here; by default every 10 s."""


@dataclass
class Submitted:
    """A job that has ended, and what was seen on the way."""

    run_dir: Path
    log: str = ""
    driver: Any = None
    trials: set[str] = field(default_factory=set)
    listening: set[str] = field(default_factory=set)
    answers: dict[str, list[Any]] | None = None
    """Of Prometheus, by query; None without one."""


@pytest.fixture(scope="module")
def submitted(
    started: Any, video_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Submitted]:
    """Fewer videos, two training workers a learning rate: one on each node."""
    folder = tmp_path_factory.mktemp("submitted")
    job = Submitted(folder / "run")
    small = [
        "experiment.data.synthetic.fit_videos=6",
        "experiment.data.synthetic.selection_videos=3",
        "experiment.data.synthetic.test_videos=4",
        "experiment.alignment.optimizer.epochs=1",
        "experiment.alignment.optimizer.schedule_epochs=1",
        "experiment.alignment.learning_rates=[1e-4,1e-3]",
        "experiment.stopping.max_drops=1",
        "execution.train_workers=2",
        "execution.loggers=[tensorboard]",
        "execution.progress_seconds=2",
        f"run_dir={job.run_dir}",
        f"cache_dir={video_cache}",
    ]

    def finished() -> bool:
        if job.trials and not job.listening:
            job.listening.update(job.driver.listening())
        for sweeps in ("ray", "ray/*"):  # over candidates, over learning rates
            found = job.run_dir.glob(f"{sweeps}/*-tune/*/result.json")
            job.trials.update(path.parent.name for path in found)
        return (job.run_dir / "frontier.parquet").is_file()

    with started(folder) as start, contextlib.ExitStack() as watching:
        command = ["-m", "pbd_ray.cluster.demo", "--nodes", "2", *small]
        job.driver = start(command, RAY_metrics_report_interval_ms=str(REPORT_MS))
        job.driver.wait_until(lambda: "dashboard: http" in job.driver.log.read_text())
        dashboard = re.search(r"dashboard: (\S+)", job.driver.log.read_text())[1]
        began = time.time()
        ask = watching.enter_context(_prometheus(f"{dashboard}/api/prometheus/sd", folder))
        job.driver.wait_until(finished, 500)
        job.log = job.driver.wait(60)
        if ask is not None:
            job.answers = {query: ask(query, began) for query in _queries()}
        yield job


def test_submitted_job(submitted: Submitted) -> None:
    """A real job; candidates and learning rates as Tune trials; a table; nothing left behind."""
    log, trials = submitted.log, submitted.trials
    assert submitted.driver.process.returncode == 0, log
    submitted.driver.assert_nothing_left()
    summary = json.loads((submitted.run_dir / "summary.json").read_text())
    assert [len(entry["kept_blocks"]) for entry in summary["rounds"]] == [7]
    assert summary["rounds"][0]["lr"] in (1e-4, 1e-3)
    assert set(summary["rounds"][0]["scores"]) == {str(block) for block in range(8)}
    assert {f"round-01-scores-block-{block:02d}" for block in range(8)} <= trials
    assert {"round-01-lr-0.0001", "round-01-lr-0.001"} <= trials
    assert submitted.listening == LOOPBACK
    measured = json.loads((submitted.run_dir / "rounds" / "01" / "measured.json").read_text())
    slices = measured["stages"]["scores"]["slices_per_node"]
    assert len(slices) == 2 and all(slices.values()), slices
    assert "ray job submit --working-dir . -- python jobs/compress.py demo" in log
    assert "drop block" in log
    assert "mAP@0.5 - teacher (interval)" in log
    assert "SUCCEEDED" in log


@pytest.mark.parametrize(
    "line",
    [
        r"teacher: evaluation: \d+%, \d workers",
        r"round 1: scores: \d+%, \d of 8 candidates, (block \d leads with \S+, )?\d workers",
        r"round 1: align: \d+%, 2 learning rates, epoch \d of 2",
    ],
)
def test_the_log_says_how_far_a_stage_is(line: str, submitted: Submitted) -> None:
    assert re.search(rf"\] {line}", submitted.log), submitted.log


def test_tensorboard_outlives_the_round(submitted: Submitted) -> None:
    """Ray's own files go with the commit."""
    events = submitted.run_dir.glob("tensorboard/*/events.out.tfevents.*")
    assert {path.parent.name for path in events} == submitted.trials
    assert not (submitted.run_dir / "ray").exists()


def test_prometheus_answers_every_query_of_the_dashboard(submitted: Submitted) -> None:
    if submitted.answers is None:
        if os.environ.get("PBD_RAY_REQUIRE_PROMETHEUS") == "1":
            pytest.fail("PBD_RAY_REQUIRE_PROMETHEUS is set but prometheus is not installed")
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    assert len(submitted.answers) >= 10
    assert [query for query, answer in submitted.answers.items() if not answer] == []
    names = {f"ray_{metric.name}{'_total' * isinstance(metric, Counter)}" for metric in METRICS}
    assert [name for name in names if not any(f"{name}{{" in query for query in submitted.answers)] == []


def _queries() -> list[str]:
    """As Grafana asks them, for all runs."""
    board = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [query.replace("$__rate_interval", "30s").replace("$run", ".*") for query in found]


@contextlib.contextmanager
def _prometheus(targets: str, folder: Path) -> Iterator[Callable[[str, float], list[Any]] | None]:
    """A Prometheus on loopback that scrapes what a URL lists; answers (query, since when) with its series."""
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"job_name": "ray", "http_sd_configs": [{"url": targets, "refresh_interval": "2s"}]}
    config = folder / "prometheus.yml"  # JSON is YAML
    config.write_text(json.dumps({"global": {"scrape_interval": "2s"}, "scrape_configs": [job]}))
    options = {
        "config.file": config,
        "storage.tsdb.path": folder / "prometheus",
        "web.listen-address": f"127.0.0.1:{port}",
        "log.level": "warn",
    }
    process = subprocess.Popen([program, *(f"--{name}={value}" for name, value in options.items())])

    def ask(query: str, since: float) -> list[Any]:
        asked = {"query": query, "start": since, "end": time.time(), "step": "2s"}
        address = f"http://127.0.0.1:{port}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            series: list[Any] = json.load(answer)["data"]["result"]
        return series

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(30)
