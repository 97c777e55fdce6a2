"""What a cluster knows of its drivers: which one holds a location, and whether a submitted job has ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from pbd_ray.cluster.holder import job_finished, sole_driver
from pbd_ray.search.storage import LedgerError

pytestmark = pytest.mark.integration

LOCATION = "bucket/run"
HOLD = f"""
import signal, sys, ray
from pbd_ray.cluster.holder import sole_driver
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="WARNING")
with sole_driver({LOCATION!r}, "the first"):
    print("held", flush=True)
    signal.pause()
"""


JOBS = """
import time
from pbd_ray.cluster.demo import _cluster, _connect
from pbd_ray.cluster.holder import job_finished

def wait(job):
    deadline = time.monotonic() + 120
    while not ask(job) and time.monotonic() < deadline:
        time.sleep(0.2)
    return ask(job)

say_id = "python -c 'from pbd_ray.cluster.holder import submission_id; print(submission_id())'"
with _cluster() as address:
    client, ask = _connect(address), job_finished(address)
    ended, runs = client.submit_job(entrypoint=say_id), client.submit_job(entrypoint="sleep 1000")
    finished = wait(ended)
    print("answer: a job knows its id", client.get_job_logs(ended).split()[-1] == ended)
    print("answer: ended", finished)
    print("answer: runs", ask(runs))
    client.stop_job(runs)
    print("answer: stopped", wait(runs))
    print("answer: another cluster's", ask("raysubmit_1"))
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of this process."""
    context = ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


def test_one_driver_of_a_cluster(address: str, start: Callable[..., Any]) -> None:
    """The second is refused by the first's name; when the first is killed its place is free at once."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")  # as this process's Ray has it
    first = start(["-c", HOLD, address], RAY_AUTH_MODE=mode)
    first.wait_until(lambda: "held" in first.log.read_text())
    with pytest.raises(LedgerError, match=f"^{LOCATION} is held by the first$"), sole_driver(LOCATION, "I"):
        pass
    with sole_driver("bucket/other", "I"):
        pass
    first.process.send_signal(signal.SIGKILL)
    for _ in range(2):  # and again after a clean end
        with sole_driver(LOCATION, "I"):
            pass


def test_jobs(start: Callable[..., Any]) -> None:
    """Asked of a job that runs, that ended, that was stopped and that is another cluster's."""
    log = start(["-c", JOBS]).wait()
    lines = [line for line in log.splitlines() if line.startswith("answer: ")]
    assert lines == [
        "answer: a job knows its id True",
        "answer: ended True",
        "answer: runs False",
        "answer: stopped True",
        "answer: another cluster's None",
    ], log


def test_no_cluster_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert job_finished(None)("raysubmit_1") is None
