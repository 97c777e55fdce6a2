"""Real Ray on this machine: jobs as processes of their own, found by a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
_MARK = "PBD_RAY_TEST_MARK"


@dataclass
class Driver:
    """A job's process; every process that Ray starts for it inherits its mark."""

    process: subprocess.Popen[str]
    log: Path
    mark: str

    def wait(self, seconds: float = 500) -> str:
        """Wait for the end; the log."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.log.read_text()}") from None
        return self.log.read_text()

    def wait_until(self, there: Callable[[], bool], seconds: float = 300) -> None:
        """Wait for something to be true while the job runs."""
        deadline = time.monotonic() + seconds
        while not there():
            assert self.process.poll() is None, f"the job ended early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.log.read_text()}"
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """Live processes with the mark, the driver among them."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    environment = (entry / "environ").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue  # it ended while we looked, or belongs to the kernel
                if f"{_MARK}={self.mark}".encode() in environment.split(b"\0") and state != "Z":
                    found.append(int(entry.name))
        return found

    def listening(self) -> set[str]:
        """Addresses at which its processes take connections."""
        found: set[str] = set()
        for pid in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                sockets = psutil.Process(pid).net_connections(kind="inet")
                found |= {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
        return found

    def assert_nothing_left(self, seconds: float = 30, but: Sequence[str] = ()) -> None:
        """Within that time all that the job started ends, except commands that contain one of `but`."""
        deadline = time.monotonic() + seconds
        while left := [
            command
            for command in map(_command, self.processes())
            if command and not any(name in command for name in but)
        ]:
            assert time.monotonic() < deadline, left
            time.sleep(0.5)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""  # it has just ended


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """start(["jobs/compress.py", ...], NAME="value") -> Driver, NAME in its environment; whatever is left at
    the end is ended, by pid."""
    drivers: list[Driver] = []

    def run(arguments: Sequence[str], **extra: str) -> Driver:
        mark, log = uuid.uuid4().hex, tmp_path / f"driver-{len(drivers)}.log"
        environment = {
            **os.environ,
            _MARK: mark,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONWARNINGS": "default",
            "PYTHONPATH": str(ROOT),
            **extra,
        }
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
            )
        drivers.append(Driver(process, log, mark))
        return drivers[-1]

    yield run
    for driver in drivers:
        for pid in driver.processes():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        driver.process.wait(30)
