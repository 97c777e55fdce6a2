"""One driver at a time in a run directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from pbd_ray.search import owner as owner_module
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.owner import Owner, owned, refuse_held, require
from pbd_ray.search.process import this_process
from pbd_ray.search.storage import LedgerError, Storage
from pbd_ray.search.verify import verify

TAKERS, REPETITIONS = 4, 100


def nobody_knows(job: str) -> bool | None:
    return None


@pytest.fixture(params=["local", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.at(str(tmp_path / "run"))
    return Storage(fs._MockFileSystem(), "bucket/run")


def leave(storage: Storage, **changes: Any) -> Owner:
    """A driver that wrote something and was killed; changed process fields go under their own names."""
    context = owned(storage, changes.pop("job", None), nobody_knows)
    owner = context.__enter__()
    storage.write("recipe.yaml", b"")
    process = replace(owner.process, **{"ticks": 1, **changes})
    left = replace(owner, process=process)
    storage.write(f"owners/{owner.epoch:04d}.json", owner_module._to_json(left))
    return left


def records(storage: Storage) -> list[dict[str, Any]]:
    return [json.loads(storage.read(name)) for name in storage.names("owners")]


def test_a_fresh_directory(storage: Storage) -> None:
    with owned(storage, "raysubmit_1", nobody_knows) as owner:
        assert (owner.epoch, owner.job, owner.process) == (1, "raysubmit_1", this_process())
        assert storage.names() == ("owners/0001.json",)
        require(storage, owner)


def test_the_second_is_refused(storage: Storage) -> None:
    with owned(storage, "raysubmit_1", nobody_knows) as first:
        before = records(storage)
        with pytest.raises(LedgerError) as error, owned(storage, None, nobody_knows):
            pass
        assert records(storage) == before
        with pytest.raises(LedgerError) as early:
            refuse_held(storage)
    who = f"pid {os.getpid()} on {first.process.host} (Ray job raysubmit_1) since {first.started}"
    assert str(error.value) == str(early.value) == f"{storage.location} is held by {who}"
    refuse_held(storage)


def test_the_next_one_after_a_clean_end(storage: Storage) -> None:
    for epoch in (1, 2, 3):
        with owned(storage, None, nobody_knows) as owner:
            storage.write("recipe.yaml", b"")
        assert owner.epoch == epoch
    assert [record["given_up"] for record in records(storage)] == [True] * 3


@pytest.mark.parametrize("error", [LedgerError, KeyboardInterrupt, SystemExit])
def test_an_error_gives_the_directory_up(storage: Storage, error: type[BaseException]) -> None:
    def fail() -> None:
        storage.write("recipe.yaml", b"")
        raise error

    with pytest.raises(error), owned(storage, None, nobody_knows):
        fail()
    with owned(storage, None, nobody_knows) as owner:
        assert owner.epoch == 2


def test_a_start_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with owned(Storage.at(str(tmp_path / "run")), None, nobody_knows):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_deleted_meanwhile_stays_deleted(tmp_path: Path) -> None:
    with owned(Storage.at(str(tmp_path / "run")), None, nobody_knows):
        shutil.rmtree(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("left", "finished"),
    [
        ({"ticks": 1}, None),  # the pid runs, as another process
        ({"pid": 2**22 + 1}, None),  # no such pid
        ({"host": "elsewhere", "job": "raysubmit_1"}, True),
    ],
)
def test_a_dead_owner_is_followed(storage: Storage, left: dict[str, Any], finished: bool | None) -> None:
    dead = leave(storage, **left)
    refuse_held(storage)
    with owned(storage, None, lambda job: finished if job == "raysubmit_1" else None) as owner:
        assert (dead.epoch, owner.epoch) == (1, 2)
        with pytest.raises(LedgerError, match=f"held by pid {os.getpid()}.*: this driver.*writes no more"):
            require(storage, dead)


@pytest.mark.parametrize(
    ("left", "finished", "advice"),
    [
        ({"host": "elsewhere"}, True, True),  # it has no Ray job
        ({"host": "elsewhere", "job": "raysubmit_1"}, None, True),
        ({"host": "elsewhere", "job": "raysubmit_1"}, False, False),
        ({"namespace": "pid:[1]"}, None, True),
    ],
)
def test_an_owner_that_may_live_is_not(
    storage: Storage, left: dict[str, Any], finished: bool | None, advice: bool
) -> None:
    other = leave(storage, **left)
    refuse_held(storage)  # it cannot tell
    with pytest.raises(LedgerError) as error, owned(storage, None, lambda job: finished):
        pass
    assert f"is held by pid {os.getpid()} on {other.process.host}" in str(error.value)
    assert str(error.value).endswith(f"delete {storage.uri('owners/0001.json')}") == advice
    assert "\n" not in str(error.value)
    storage.filesystem.delete_file(f"{storage.root}/owners/0001.json")
    with owned(storage, None, nobody_knows):
        pass


def test_a_copy_is_nobodys(tmp_path: Path) -> None:
    """A running driver's directory is copied: the copy goes on at once, the original stays held."""
    with owned(Storage.at(str(tmp_path / "run")), None, nobody_knows):
        (tmp_path / "run" / "recipe.yaml").touch()
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        refuse_held(Storage.at(str(tmp_path / "copy")))
        with owned(Storage.at(str(tmp_path / "copy")), None, nobody_knows) as owner:
            assert owner.epoch == 2


@pytest.mark.parametrize("same", ["link", "moved"])
def test_another_name_of_the_directory_is_no_copy(tmp_path: Path, same: str) -> None:
    with owned(Storage.at(str(tmp_path / "run")), None, nobody_knows):
        if same == "link":
            (tmp_path / "other").symlink_to(tmp_path / "run")
        else:
            (tmp_path / "run").rename(tmp_path / "other")
        other = Storage.at(str(tmp_path / "other"))
        with pytest.raises(LedgerError, match="is held by"), owned(other, None, nobody_knows):
            pass


# The number after it might be one that is taken.
OTHER_EPOCH = json.dumps(asdict(Owner(5, this_process(), None, "", "", None)))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"process": {}}', OTHER_EPOCH])
def test_a_broken_record_is_named(storage: Storage, text: str) -> None:
    """It is not taken for a dead driver's: on some file systems a record is seen before its content."""
    storage.write("owners/0007.json", text.encode())
    with pytest.raises(LedgerError, match=r"owners/0007.json: not an owner's record") as error:
        owned(storage, None, nobody_knows).__enter__()
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="run cannot be written"):
        owned(Storage.at(str(tmp_path / "file" / "run")), None, nobody_knows).__enter__()


def race(stack: contextlib.ExitStack, storage: Storage) -> tuple[list[Owner], list[LedgerError]]:
    """What several threads get that start together; the winner owns the directory until the stack ends."""
    barrier = threading.Barrier(TAKERS)
    winners: list[Owner] = []
    refused: list[LedgerError] = []

    def run() -> None:
        barrier.wait()
        try:
            winners.append(stack.enter_context(owned(storage, None, nobody_knows)))
        except LedgerError as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(TAKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners, refused


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_of_many_at_once_one_wins(
    tmp_path: Path, dead: bool, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the directory is fresh or its owner dead; also where the file system has no links."""
    if not links:

        def no_link(source: object, target: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_link)
    for repetition in range(REPETITIONS):
        storage = Storage.at(str(tmp_path / str(repetition)))
        if dead:
            leave(storage)
        with contextlib.ExitStack() as stack:
            winners, refused = race(stack, storage)
            assert [winner.epoch for winner in winners] == [2 if dead else 1]
            assert len(refused) == TAKERS - 1


def test_of_many_processes_one_wins(tmp_path: Path) -> None:
    code = (
        "import contextlib, sys\n"
        "from pbd_ray.search.owner import owned\n"
        "from pbd_ray.search.storage import Storage\n"
        "print('ready', flush=True)\n"
        "with contextlib.ExitStack() as stack:\n"
        "    for line in sys.stdin:\n"
        "        try:\n"
        "            stack.enter_context(owned(Storage.at(line.strip()), None, lambda job: None))\n"
        "            print('won', flush=True)\n"
        "        except ValueError as error:\n"
        "            print(error, flush=True)\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    takers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) for _ in range(3)]
    try:
        assert [taker.stdout.readline() for taker in takers if taker.stdout] == ["ready\n"] * 3
        for repetition in range(REPETITIONS):
            storage = Storage.at(str(tmp_path / str(repetition)))
            leave(storage)
            for taker in takers:
                assert taker.stdin is not None
                print(storage.root, file=taker.stdin, flush=True)
            answers = [taker.stdout.readline() for taker in takers if taker.stdout]
            (winner,) = [
                taker.pid for taker, answer in zip(takers, answers, strict=True) if answer == "won\n"
            ]
            assert sum(f"is held by pid {winner} on" in answer for answer in answers) == 2
    finally:
        for taker in takers:
            taker.communicate()


def test_commits_name_their_owner(tmp_path: Path, make_world: Callable[..., Any]) -> None:
    """Killed after round 1 and taken over: the epochs differ, the results are those of an undisturbed run."""
    world = make_world()
    storage = Storage.at(str(tmp_path / "run"))
    with owned(storage, None, nobody_knows) as first:
        world.run(storage, owner=first)
    (tmp_path / "run" / "rounds" / "02" / "commit.json").unlink()
    with owned(storage, None, nobody_knows) as second:
        world.run(storage, owner=second)
    folders = [Ledger.existing(storage).round(number) for number in range(3)]
    assert [folder.read_commit()["epoch"] for folder in folders] == [1, 1, 2]
    assert verify(storage) == []
    make_world().run(str(tmp_path / "undisturbed"))
    undisturbed = Ledger.existing(str(tmp_path / "undisturbed")).committed()
    assert [record.result for record in Ledger.existing(storage).committed()] == [
        record.result for record in undisturbed
    ]


def test_one_that_lost_the_directory_commits_nothing(tmp_path: Path, make_world: Callable[..., Any]) -> None:
    storage = Storage.at(str(tmp_path / "run"))
    dead = leave(storage)
    storage.filesystem.delete_file(f"{storage.root}/recipe.yaml")
    with owned(storage, None, nobody_knows), pytest.raises(LedgerError, match="writes no more"):
        make_world().run(storage, owner=dead)
    assert not storage.exists("teacher/commit.json")
