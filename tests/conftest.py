"""What every tier shares: where the reference data lies, and one seed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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
