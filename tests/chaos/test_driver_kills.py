"""SIGKILL of the driver at seeded moments; the same command is started until the run has ended.

Three kills; with PBD_RAY_CHAOS=long twenty, spread over the same stages. `-s` prints when each was and what
it cost; PBD_RAY_CHAOS_JSON names a file that gets the same numbers.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbd_ray.search.verify import verify

KILLS, SEED = (20 if os.environ.get("PBD_RAY_CHAOS") == "long" else 3), 16
STAGES = [
    ("start", 15),
    ("fitting the uncompressed detector", 25),
    ("teacher: evaluation", 10),
    *(
        (f"round {number}: {stage}", seconds)
        for number in (1, 2)
        for stage, seconds in (("scores", 10), ("align", 50), ("evaluation", 15))
    ),
]
"""In the order of the log, each with the seconds after its line within which it is killed."""


@dataclass(frozen=True)
class Kill:
    """What a kill cost."""

    stage: str
    """The last one that the log speaks of."""
    ran_seconds: float
    """From the driver's start to the kill."""
    lost_seconds: float
    """From the last record on disk, or else the driver's start, to the kill: done again."""
    again_seconds: float | None
    """From the next start to its first new record, what it takes to be back at work; None if that start was
    killed before."""


def moments(kills: int, seed: int) -> list[tuple[int, float]]:
    """(place in STAGES, seconds after its line) of every kill, one in each `kills`-th part of the run."""
    rng = np.random.default_rng(seed)
    places = [int(len(STAGES) * (part + rng.random()) / kills) for part in range(kills)]
    return [(place, float(rng.uniform(0, STAGES[place][1]))) for place in places]


def records(run_dir: Path) -> dict[Path, int]:
    """Files that a later start goes on from, with the time in ns when they were written."""
    found = {}
    for path in run_dir.rglob("*"):
        # Of Ray's own files: a checkpoint counts once Ray Train's list of them names it.
        durable = path.parts[len(run_dir.parts)] in ("teacher", "rounds") and ".tmp-" not in path.name
        if durable or path.name == "checkpoint_manager_snapshot.json":
            with_time(found, path)
    return found


def with_time(found: dict[Path, int], path: Path) -> None:
    try:
        if path.is_file():
            found[path] = path.stat().st_mtime_ns
    except FileNotFoundError:
        pass  # moved into place or deleted meanwhile


def stage_reached(log: str) -> int:
    return max(place for place, (line, _) in enumerate(STAGES) if line == "start" or f"] {line}" in log)


def tables(found: dict[Path, int]) -> dict[Path, int]:
    return {path: time_ns for path, time_ns in found.items() if path.suffix == ".parquet"}


@pytest.mark.chaos
@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(120 * KILLS + 600)
def test_the_same_command_until_the_run_has_ended(
    start: Callable[..., Any],
    command: Callable[..., list[str]],
    outcome: Callable[[Path], Any],
    fitted: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    drivers, kills, written = [], [], {}
    for place, delay in moments(KILLS, SEED):
        began, before = time.time_ns(), records(run_dir)
        drivers.append(start(command(run_dir, None)))
        stage = kill(drivers[-1], place, delay)
        killed, there = time.time_ns(), records(run_dir)
        kills.append((stage, began, before, there, killed))
        written |= tables(there)
    last_began = time.time_ns()
    drivers.append(start(command(run_dir, None)))
    log = drivers[-1].wait()
    assert drivers[-1].process.returncode == 0, log

    print_costs(costs(kills, last_began, records(run_dir)))
    assert all(driver.process.returncode == -signal.SIGKILL for driver in drivers[:-1])
    assert outcome(run_dir) == outcome(fitted)
    assert {path: path.stat().st_mtime_ns for path in written} == written, "something was written twice"
    assert verify(str(run_dir)) == []
    assert json.loads((run_dir / "summary.json").read_text())["bit_exact"]
    for driver in drivers:
        driver.assert_nothing_left(90)


def kill(driver: Any, place: int, delay_seconds: float) -> str:
    """Kill the driver so long after a stage's line, or a later one's; the stage it was in."""
    driver.wait_until(lambda: stage_reached(driver.log.read_text()) >= place)
    time.sleep(delay_seconds)
    driver.process.send_signal(signal.SIGKILL)
    driver.process.wait(10)
    return STAGES[stage_reached(driver.log.read_text())][0]


def costs(kills: Sequence[Any], last_began: int, at_end: dict[Path, int]) -> list[Kill]:
    """What each kill cost, from the records before and after each start."""
    begins = [*(began for _, began, *_ in kills[1:]), last_began]
    seen = [*(there for _, _, _, there, _ in kills[1:]), at_end]
    found = []
    for (stage, began, before, there, killed), next_began, after in zip(kills, begins, seen, strict=True):
        last = max((time_ns for path, time_ns in there.items() if before.get(path) != time_ns), default=began)
        new = min((time_ns for path, time_ns in after.items() if there.get(path) != time_ns), default=None)
        again = None if new is None else (new - next_began) / 1e9
        found.append(Kill(stage, (killed - began) / 1e9, (killed - max(last, began)) / 1e9, again))
    return found


def print_costs(found: Sequence[Kill]) -> None:
    print(f"\n{'killed in':36} {'ran s':>7} {'lost s':>7} {'back after s':>13}")
    for kill in found:
        again = "-" if kill.again_seconds is None else f"{kill.again_seconds:.1f}"
        print(f"{kill.stage:36} {kill.ran_seconds:7.1f} {kill.lost_seconds:7.1f} {again:>13}")
    if name := os.environ.get("PBD_RAY_CHAOS_JSON"):
        Path(name).write_text(json.dumps([asdict(kill) for kill in found], indent=2))
