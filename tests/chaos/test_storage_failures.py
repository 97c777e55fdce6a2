"""A disk that fills up and an S3 that answers with errors: one line, and the same result later."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.cluster import places
from pbd_ray.search import owner, patience
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.storage import TEMPORARY
from pbd_ray.search.verify import verify

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


@pytest.fixture(autouse=True)
def another_process_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that could not even write that it ends is dead by the next start; here it is the same process.
    Nothing is waited for between two tries."""
    monkeypatch.setattr(owner, "lives", lambda process: False)
    monkeypatch.setattr(patience, "sleep", lambda seconds: None)


GO_ON = "the same command goes on from here"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(kilobytes) -> a file system of that size; called again it is the same one, resized."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def size(kilobytes: int) -> Path:
        nonlocal mounted
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"this user may not mount: {done.stderr.strip()}")
        mounted = True
        return place

    yield size
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up(
    small_disk: Callable[[int], Path],
    given: Path,
    teacher: Path,
    compress_here: Callable[..., None],
    outcome: Callable[[Path], Any],
    answer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is full again and again, in every stage of the run; room is made and the same command started."""
    monkeypatch.setattr(places, "free_bytes", lambda path: 10**9)  # others fill it after the start has looked
    kilobytes, errors, status = 12, [], 1
    while status:
        disk = small_disk(kilobytes)
        status, lines = answer(partial(compress_here, disk / "run", teacher))
        if status:
            (error,) = lines
            errors.append(error)
            assert status == 1, error
            assert error.startswith(f"error: cannot write {disk}/run/"), error
            assert error.endswith(f"No space left on device; with space {GO_ON}"), error
            assert [path for path in disk.rglob("*") if TEMPORARY in path.name] == [], error
            kilobytes += 280 if "model.safetensors" in error else 44
    for error in errors:
        print(error)
    assert len(set(errors)) > 5, "it was full in a few places only"
    assert outcome(disk / "run") == outcome(given)
    assert verify(str(disk / "run")) == []


def answers(status: int, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>meant</Message></Error>"
    head = f"HTTP/1.1 {status} meant\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


FAULTS = [
    answers(500, "InternalError"),
    answers(503, "SlowDown"),
    b"",  # the connection is closed without an answer
]


def test_an_s3_that_fails_now_and_then_and_then_for_good(
    s3_uri: Callable[..., str],
    relay: Callable[..., Any],
    given: Path,
    teacher: Path,
    compress_here: Callable[..., None],
    answer: Callable[..., Any],
) -> None:
    """Every seventh request fails in one of three ways; from some request on every one does."""
    errors, for_good = [], 25
    while True:
        busy = relay(lambda n, last=for_good: FAULTS[n // 7 % 3] if n % 7 == 0 or n > last else None)
        place = s3_uri("run", busy.endpoint)
        status, lines = answer(partial(compress_here, place, teacher))
        if status == 0:
            break
        (error,) = [line for line in lines if "; trying again in " not in line]
        errors.append(error)
        assert status == 1, error
        assert error.startswith("error: cannot "), error
        assert error.endswith(f"(tried 5 times); {GO_ON}"), error
        for_good = for_good * 3
    print(*errors, sep="\n")
    assert len(errors) > 2
    results = [record.result for record in Ledger.existing(s3_uri("run")).committed()]
    assert results == [record.result for record in Ledger.existing(str(given)).committed()]
    assert verify(s3_uri("run")) == []
