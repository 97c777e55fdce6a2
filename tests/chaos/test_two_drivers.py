"""Two drivers on one run directory: the second is refused, and the next one after a SIGKILL goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.search.verify import verify

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

Start = Callable[[Sequence[str]], Any]


@pytest.fixture
def command(tiny_recipe: str, video_cache: Path, run_dir: Path) -> list[str]:
    overrides = [f"run_dir={run_dir}", f"cache_dir={video_cache}", "backend=local"]
    return ["jobs/compress.py", tiny_recipe, *overrides]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def owner(run_dir: Path, epoch: int) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run_dir / "owners" / f"{epoch:04d}.json").read_text())
    return value


def test_refused_then_taken_over(start: Start, command: list[str], run_dir: Path) -> None:
    first = start(command)
    first.wait_until(lambda: (run_dir / "teacher" / "commit.json").is_file())
    first.process.send_signal(signal.SIGSTOP)  # it lives, and is not done before the second has looked

    without = "import runpy, sys; sys.modules['torch'] = sys.modules['ray'] = None; sys.argv = sys.argv[1:]\n"
    at_once = ["-c", f"{without}runpy.run_path(sys.argv[0], run_name='__main__')", *command]
    second = start(at_once)  # before torch and Ray, which take seconds, could be imported
    log = second.wait()
    assert second.process.returncode == 2, log
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {run_dir} is held by pid {first.process.pid} on ")
    assert first.process.poll() is None
    assert not (run_dir / "owners" / "0002.json").exists()

    first.process.send_signal(signal.SIGKILL)  # it is not buried yet when the third looks
    third = start(command)
    log = third.wait()
    assert third.process.returncode == 0, log
    assert [owner(run_dir, epoch)["given_up"] for epoch in (1, 2)] == [False, True]
    assert owner(run_dir, 2)["process"]["pid"] == third.process.pid
    folders = [run_dir / "teacher", run_dir / "rounds" / "01", run_dir / "rounds" / "02"]
    epochs = [json.loads((folder / "commit.json").read_text())["epoch"] for folder in folders]
    assert (epochs[0], epochs[-1]) == (1, 2)
    assert verify(str(run_dir)) == []


# What a script starts with & ignores SIGINT.
IGNORING = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""


@pytest.mark.parametrize(
    ("before", "signum", "status"), [(["-c", IGNORING], signal.SIGTERM, 143), ([], signal.SIGINT, 130)]
)
def test_stopped_gives_up(
    start: Start, command: list[str], run_dir: Path, before: list[str], signum: signal.Signals, status: int
) -> None:
    driver = start([*before, *command])
    driver.wait_until(lambda: (run_dir / "environment.json").is_file())
    driver.process.send_signal(signum)
    log = driver.wait(60)
    assert driver.process.returncode == status, log
    assert owner(run_dir, 1)["given_up"]
