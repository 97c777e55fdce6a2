"""What every tier shares: where the reference data lies, one seed, an S3 server, jobs as processes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs inherit it where a script ignores it
torch.set_num_threads(1)  # as in every worker of a run; test files run side by side

SHARED = Path(__file__).parents[2] / "shared"
COPIES = Path(__file__).parent / "golden" / "data"
REQUIRED = os.environ.get("PBD_RAY_REQUIRE_SHARED") == "1"


def shared_folder() -> Path:
    if not SHARED.is_dir():
        if REQUIRED:
            pytest.fail("PBD_RAY_REQUIRE_SHARED is set but ../shared is not there")
        pytest.skip("the reference data (../shared) is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers and real data beside the project."""
    return shared_folder()


@pytest.fixture(scope="session")
def reference_file() -> Callable[[str], Path]:
    """reference_file(name) -> a file of ../shared/reference, or its copy in tests/golden/data without it."""

    def find(name: str) -> Path:
        copy = COPIES / name
        if not SHARED.is_dir() and not REQUIRED and copy.is_file():
            return copy
        return shared_folder() / "reference" / name

    return find


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


TINY = str(Path(__file__).parent / "recipes" / "tiny.yaml")


@pytest.fixture(scope="session")
def tiny_recipe() -> str:
    """A recipe that runs every stage in seconds."""
    return TINY


@pytest.fixture(scope="session")
def video_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embedded videos of tiny recipes are generated, once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def untrained_teacher(tiny_recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of a tiny detector that knows nothing, for where any will do: fitting one takes seconds."""
    from pbd_ray.config import load_recipe
    from pbd_ray.data.synthetic import CLASSES
    from pbd_ray.detector.bundle import save_bundle
    from pbd_ray.detector.detector import Detector

    folder = tmp_path_factory.mktemp("bundles") / "teacher"
    torch.manual_seed(0)
    save_bundle(folder, Detector(load_recipe(tiny_recipe).experiment.detector, len(CLASSES)), CLASSES, {})
    return folder


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of an S3 server on this machine; credentials for it are in the environment."""
    log = tmp_path_factory.mktemp("s3") / "server.log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"Running on http://(127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"no S3 server within 120 s: {log.read_text()}"
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ACCESS_KEY_ID", "test")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
            yield found[1]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def s3_uri(s3_endpoint: str) -> Callable[[str], str]:
    """s3_uri("a/run") -> URI of that path in a bucket of this test's own."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    request = urllib.request.Request(f"http://{s3_endpoint}/{bucket}", method="PUT")
    with urllib.request.urlopen(request, timeout=30):
        pass

    def uri(path: str, endpoint: str = s3_endpoint) -> str:
        return f"s3://{bucket}/{path}?scheme=http&endpoint_override={endpoint}&region=us-east-1"

    return uri


class Relay(socketserver.ThreadingTCPServer):
    """Before an S3 server: gives the n-th connection, counted from 1, the answer that `fault(n)` says; where
    that is None the connection is let through."""

    daemon_threads = True

    def __init__(self, behind: str, fault: Callable[[int], bytes | None]) -> None:
        super().__init__(("127.0.0.1", 0), _RelayHandler)
        host, _, port = behind.partition(":")
        self.behind, self.fault, self.connections = (host, int(port)), fault, 0
        self.endpoint = f"127.0.0.1:{self.server_address[1]}"


class _RelayHandler(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        self.server.connections += 1
        client, answer = self.request, self.server.fault(self.server.connections)
        if answer is not None:
            client.recv(65536)
            client.sendall(answer)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                continue
            return
        with socket.create_connection(self.server.behind) as s3:
            back = threading.Thread(target=_pump, args=(s3, client))
            back.start()
            _pump(client, s3)
            back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):  # either side has gone
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(s3_endpoint: str) -> Iterator[Callable[[Callable[[int], bytes | None]], Relay]]:
    """relay(fault) -> a Relay that runs until the test's end."""
    with contextlib.ExitStack() as servers:

        def start(fault: Callable[[int], bytes | None]) -> Relay:
            server = servers.enter_context(Relay(s3_endpoint, fault))
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            servers.callback(server.shutdown)
            return server

        yield start


ROOT = Path(__file__).parents[1]
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


@contextlib.contextmanager
def _started(folder: Path) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def run(arguments: Sequence[str], **extra: str) -> Driver:
        mark, log = uuid.uuid4().hex, folder / f"driver-{len(drivers)}.log"
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

    try:
        yield run
    finally:
        for driver in drivers:
            for pid in driver.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            driver.process.wait(30)


@pytest.fixture(scope="session")
def started() -> Callable[[Path], contextlib.AbstractContextManager[Callable[..., Driver]]]:
    """started(folder): `start` for fixtures of a wider scope; logs go to the folder."""
    return _started


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """start(["jobs/compress.py", ...], NAME="value") -> Driver, NAME in its environment; whatever is left at
    the end is ended, by pid."""
    with _started(tmp_path) as run:
        yield run
