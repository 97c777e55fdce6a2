"""Storage that fails: tried again with the reason said, or ended in one line; and what a run is left with."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from pbd_ray.search import patience, storage
from pbd_ray.search.patience import StorageDenied, StorageError, patiently
from pbd_ray.search.storage import Storage
from pbd_ray.search.verify import verify

S3 = "When getting information for key 'x' in bucket 'b': AWS Error "
PASSING = [
    OSError("connection reset"),
    OSError(errno.EIO, "input/output error"),
    OSError(errno.ESTALE, "stale file handle"),
    TimeoutError("timed out"),
    OSError(S3 + "SLOW_DOWN during PutObject operation"),
    OSError(S3 + "SERVICE_UNAVAILABLE during PutObject operation"),
    OSError(S3 + "NETWORK_CONNECTION during HeadObject operation: curlCode: 28, Timeout was reached"),
    OSError(S3 + "UNKNOWN (HTTP status 500) during HeadObject operation"),
]
DENIED = [
    PermissionError(errno.EACCES, "permission denied"),
    OSError(errno.EROFS, "read-only file system"),
    NotADirectoryError(errno.ENOTDIR, "not a directory"),
    OSError(S3 + "ACCESS_DENIED during HeadObject operation"),
    OSError(S3 + "NO_SUCH_BUCKET during PutObject operation"),
    OSError(S3 + "UNKNOWN (HTTP status 400) during HeadObject operation"),
]
FULL = [OSError(errno.ENOSPC, "no space left on device"), OSError(errno.EDQUOT, "quota exceeded")]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited; nothing is."""
    waited: list[float] = []
    monkeypatch.setattr(patience, "sleep", waited.append)
    return waited


def failing(error: OSError, times: int) -> Callable[[], str]:
    left = [error] * times

    def action() -> str:
        if left:
            raise left.pop()
        return "done"

    return action


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_may_pass_is_tried_again(error: OSError, waits: list[float], caplog) -> None:
    assert patiently(failing(error, 4), "write /run/a") == "done"
    assert waits == [0.5, 1.0, 2.0, 4.0]
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == f"cannot write /run/a: {error}; trying again in 0.5 s"
    assert len(lines) == 4
    with pytest.raises(StorageError) as raised:
        patiently(failing(error, 5), "write /run/a")
    assert (
        str(raised.value)
        == f"cannot write /run/a: {error} (tried 5 times); the same command goes on from here"
    )


@pytest.mark.parametrize("error", DENIED, ids=str)
def test_what_is_denied_is_not_tried_again(error: OSError, waits: list[float], caplog) -> None:
    with pytest.raises(StorageDenied) as raised:
        patiently(failing(error, 1), "write /run/a")
    assert str(raised.value) == f"cannot write /run/a: {error}"
    assert (waits, caplog.records) == ([], [])


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_disk_is_not_tried_again(error: OSError, waits: list[float]) -> None:
    with pytest.raises(StorageError, match="with space the same command goes on"):
        patiently(failing(error, 1), "write /run/a")
    assert waits == []


def test_a_missing_file_is_not_tried_again(waits: list[float]) -> None:
    with pytest.raises(FileNotFoundError):
        patiently(failing(FileNotFoundError(errno.ENOENT, "no such file"), 1), "read /run/a")
    assert waits == []


def test_pyarrow_tells_a_full_disk(tmp_path: Path) -> None:
    """Linux's own error for a full device, as pyarrow hands it on."""
    there = Storage.at(str(tmp_path))
    there.write("a", b"old")
    put = there._put
    there._put = lambda path, content: put("/dev/full", content)
    with pytest.raises(StorageError, match=r"cannot write .*a: .*No space left on device"):
        there.write("a", b"new" * 1000)
    assert there.read("a") == b"old"
    assert there.names() == ("a",)


def test_pyarrow_tells_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(StorageDenied, match="cannot write"):
        Storage.at(str(tmp_path / "x" / "run")).write("a", b"1")


class Stumbling:
    """A file system whose n-th call, counted from 1, fails where `fails(n)` says so."""

    def __init__(self, filesystem: fs.FileSystem, fails: Callable[[int], bool]) -> None:
        self.filesystem, self.fails, self.calls = filesystem, fails, 0
        self.type_name = filesystem.type_name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.filesystem, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.fails(self.calls):
                raise OSError(f"connection reset in {name}")
            return method(*arguments, **named)

        return call


def stumbling(run_dir: Path, fails: Callable[[int], bool]) -> Storage:
    return Storage(Stumbling(fs.LocalFileSystem(), fails), str(run_dir))


def results(summary: Any) -> list[str]:
    return [record.result for record in (summary.teacher, *summary.rounds)]


def test_a_run_on_storage_that_stumbles(tmp_path: Path, make_world, caplog) -> None:
    expected = results(make_world().run(str(tmp_path / "good")))
    bad = stumbling(tmp_path / "bad", lambda call: call % 5 == 0)
    assert results(make_world().run(bad)) == expected
    assert verify(str(tmp_path / "bad")) == []
    assert len(caplog.records) == bad.filesystem.calls // 5
    assert all("connection reset" in record.getMessage() for record in caplog.records)


def test_a_run_on_storage_that_fails_for_good(tmp_path: Path, make_world) -> None:
    """Wherever it fails, the run ends with the line, and started again on good storage it ends alike."""
    good = stumbling(tmp_path / "good", lambda call: False)
    expected = results(make_world().run(good))
    for last in range(0, good.filesystem.calls, 71):
        run_dir = tmp_path / f"{last}"
        with pytest.raises(StorageError, match=r"tried 5 times.*the same command goes on from here") as error:
            make_world().run(stumbling(run_dir, lambda call, last=last: call > last))
        assert "\n" not in str(error.value)
        assert results(make_world().run(str(run_dir))) == expected, last
        assert verify(str(run_dir)) == []


def answers(status: int, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>meant</Message></Error>"
    head = f"HTTP/1.1 {status} meant\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


def test_a_run_on_busy_s3(tmp_path: Path, make_world, s3_uri, relay, caplog) -> None:
    """Every ninth request is answered with 503; pyarrow's client tries none of them again by itself."""
    one_round = {"experiment__stopping": {"max_drops": 1}}
    expected = results(make_world(one_round).run(str(tmp_path / "local")))
    slow_down = answers(503, "SlowDown")
    busy = relay(lambda connection: slow_down if connection % 9 == 0 else None)
    assert results(make_world(one_round).run(s3_uri("run", busy.endpoint))) == expected
    assert verify(s3_uri("run")) == []
    assert busy.connections > 100
    assert len(caplog.records) == busy.connections // 9


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "AccessDenied", StorageDenied),
        (403, "InvalidAccessKeyId", StorageDenied),
        (403, "SignatureDoesNotMatch", StorageDenied),
        (400, "ExpiredToken", StorageDenied),
        (500, "InternalError", StorageError),
        (503, "SlowDown", StorageError),
    ],
)
def test_what_s3_answers(status: int, code: str, error: type[Exception], s3_uri, relay, caplog) -> None:
    """To the first look, which has no body to name the code, and to a write."""
    place = s3_uri("run", relay(lambda connection: answers(status, code)).endpoint)
    with pytest.raises(error, match="cannot look up"):
        Storage.at(place)
    there = Storage(*storage._from_uri(place), place)
    with pytest.raises(error, match="cannot write") as raised:
        there.write("a", b"1")
    assert "\n" not in str(raised.value)
    assert Storage.at(s3_uri("run")).names() == ()


def test_s3_that_refuses_connections(s3_uri) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(StorageError, match=r"onnect.*\(tried 5 times\)"):
            Storage.at(s3_uri("run", f"127.0.0.1:{closed.getsockname()[1]}"))


def test_s3_that_never_answers(s3_uri, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(storage, "SILENCE_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        with pytest.raises(StorageError, match=r"last 1 seconds.*\(tried 5 times\)"):
            Storage.at(s3_uri("run", f"127.0.0.1:{silent.getsockname()[1]}"))
    assert len(caplog.records) == 4
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
