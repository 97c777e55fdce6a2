"""A cluster of three nodes that loses processes and nodes while its driver goes on: the same result."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pbd_ray.search.verify import verify

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]

ONLY_LONG = pytest.mark.skipif(
    os.environ.get("PBD_RAY_CHAOS") != "long", reason="takes minutes: only with PBD_RAY_CHAOS=long"
)
EPOCHS = 12
SHAPE = [
    "stopping.max_drops=1",
    "alignment.learning_rates=[1.0e-3]",
    "alignment.halving=off",
    f"alignment.optimizer.epochs={EPOCHS}",
    f"alignment.optimizer.schedule_epochs={EPOCHS}",
]
"""One round and one learning rate, with time to hit a fine-tuning run after one of its checkpoints."""
LOOPBACK = {"node_ip_address": "127.0.0.1"}
# Else a driver replaces a loopback address by the machine's own.
STAY_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Titles that Ray gives to processes while they run a method.
SCORING, TRAINING = "ray::ScoringWorker.score", "ray::RayTrainWorker"
CONTROLLER, TRIAL, BOARD = "ray::TrainController", "ray::ImplicitFunc", "ray::Board"


@pytest.fixture(scope="module")
def expected(
    compress_here: Callable[..., None],
    outcome: Callable[[Path], Any],
    teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Outcome of the same run in one process."""
    run_dir = tmp_path_factory.mktemp("expected") / "run"
    compress_here(run_dir, teacher, *SHAPE)
    return outcome(run_dir)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that computes nothing and two nodes of one CPU."""
    temporary = tempfile.TemporaryDirectory(prefix="ray-")  # names of sockets must be short
    head = {
        "num_cpus": 0,
        "include_dashboard": True,
        "dashboard_port": 0,
        "object_store_memory": 200_000_000,
        "temp_dir": temporary.name,
        **LOOPBACK,
    }
    with temporary, pytest.MonkeyPatch.context() as environment:
        for name, value in {"RAY_AUTH_MODE": "disabled", **STAY_ON_LOOPBACK}.items():
            environment.setenv(name, value)
        there = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                add_node(there)
            yield there
        finally:
            there.shutdown()


def add_node(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000, **LOOPBACK)


@dataclass(frozen=True)
class Worker:
    pid: int
    node: Any


def workers(cluster: Cluster, title: str) -> list[Worker]:
    """Live processes of that title, with their node: they are children of its raylet."""
    raylets = {raylet_pid(node): node for node in cluster.list_all_nodes()}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_text(errors="replace")
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue  # it ended while we looked
            if command.startswith(title) and state != "Z" and int(parent) in raylets:
                found.append(Worker(int(entry.name), raylets[int(parent)]))
    return found


def raylet_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


class Losses:
    """What died in a run, and how long it took until there was something new on disk."""

    def __init__(self, cluster: Cluster, driver: Any, run_dir: Path) -> None:
        self.cluster, self.driver, self.run_dir = cluster, driver, run_dir
        self.lines: list[str] = []

    def slices(self) -> int:
        return len(list((self.run_dir / "rounds/01/scores").glob("[0-9]*.parquet")))

    def checkpoints(self) -> int:
        """A number that grows with every checkpoint that Ray Train has put on its list."""
        found = self.run_dir.glob("ray/*/*/checkpoint_manager_snapshot.json")
        return max((path.stat().st_mtime_ns for path in found), default=0)

    def after(
        self, progress: Callable[[], int], title: str, lose: Callable[[Worker], None], what: str
    ) -> None:
        """Once there is new progress and a worker of that title, lose it, and wait for more progress."""
        before = progress()
        self.until(lambda: progress() > before)
        lose(self.worker(title))
        lost, there = time.monotonic(), progress()
        self.until(lambda: progress() > there)
        self.lines.append(f"{what:28} {time.monotonic() - lost:6.1f} s until the next record")

    def worker(self, title: str) -> Worker:
        """The first one of that title, once there is one."""
        found: list[Worker] = []

        def there() -> bool:
            found.extend(workers(self.cluster, title))
            return bool(found)

        self.until(there)
        return found[0]

    def until(self, there: Callable[[], bool], seconds: float = 600) -> None:
        """As `Driver.wait_until`, with finer steps: a slice takes a tenth of a second."""
        deadline = time.monotonic() + seconds
        while not there():
            log = self.driver.log.read_text
            assert self.driver.process.poll() is None, f"the job ended early:\n{log()}"
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{log()}"
            time.sleep(0.01)

    def ended(self) -> str:
        log: str = self.driver.wait(900)
        assert self.driver.process.returncode == 0, log
        epochs = re.findall(r"round-01-\S+: epoch (\d+)/", log)
        again = len(epochs) - len(set(epochs))
        print("", *self.lines, f"{again} epochs of {EPOCHS} were trained again", sep="\n")
        return log


def kill(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGKILL)


@pytest.fixture
def begin(
    cluster: Cluster,
    start: Callable[..., Any],
    command: Callable[..., list[str]],
    teacher: Path,
    tmp_path: Path,
) -> Callable[..., Losses]:
    """begin("key=value", ...) -> a driver that has joined the cluster."""

    def run(*more: str) -> Losses:
        run_dir = tmp_path / "run"
        joined = [f"execution.ray_address={cluster.address}", "execution.slices_per_worker=3"]
        arguments = command(run_dir, teacher, *SHAPE, *joined, *more)
        return Losses(cluster, start(arguments, **STAY_ON_LOOPBACK), run_dir)

    return run


def test_processes_that_are_killed(
    begin: Callable[..., Losses], expected: Any, outcome: Callable[[Path], Any]
) -> None:
    def kill_with_the_board(worker: Worker) -> None:
        kill(worker)
        kill(run.worker(BOARD))

    run = begin()
    run.after(run.slices, SCORING, kill_with_the_board, "scoring worker, and board")
    run.after(run.checkpoints, TRAINING, kill, "training worker")
    run.after(run.checkpoints, CONTROLLER, kill, "controller of Ray Train")
    run.after(run.checkpoints, TRIAL, kill, "trial of Ray Tune")
    run.ended()
    measured = json.loads((run.run_dir / "rounds/01/measured.json").read_text())
    assert measured["stages"]["scores"]["retries"] >= 1
    assert outcome(run.run_dir) == expected
    assert verify(str(run.run_dir)) == []


@ONLY_LONG
def test_nodes_that_are_lost(
    cluster: Cluster, begin: Callable[..., Losses], expected: Any, outcome: Callable[[Path], Any]
) -> None:
    def lose(worker: Worker) -> None:
        add_node(cluster)  # what an autoscaler does, sooner
        cluster.remove_node(worker.node, allow_graceful=False)

    run = begin()
    run.after(run.slices, SCORING, lose, "node with a scoring worker")
    run.after(run.checkpoints, TRAINING, lose, "node with a training worker")
    run.ended()
    assert outcome(run.run_dir) == expected
    assert verify(str(run.run_dir)) == []


@ONLY_LONG
def test_a_training_worker_too_many(
    begin: Callable[..., Losses], expected: Any, outcome: Callable[[Path], Any]
) -> None:
    """A learning rate that fails ends the run in one line, and is not left out of the choice."""
    run = begin("execution.task_retries=0")
    run.until(lambda: run.checkpoints() > 0)
    kill(run.worker(TRAINING))
    log = run.driver.wait()
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    print(error)
    assert run.driver.process.returncode == 1
    assert error.startswith("error: learning rate 0.001: training worker 0: The actor died unexpectedly")
    assert error.endswith("; the same command goes on from here")
    assert "Traceback (most recent call last)\n" not in log
    begin().ended()
    assert outcome(run.run_dir) == expected
