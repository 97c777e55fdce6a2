"""Who may write a run directory: one driver at a time.

`owners/NNNN.json`, one file a driver that ever wrote, is a chain: the highest number is the owner, unless it
has given the directory up, is dead, or wrote the directory that this one is a copy of; then the next number
is free. Taking a directory is creating the file of the next number, which only one can: a record is never
taken away from anybody, so of two that find the same dead owner the slower one finds the faster one's record.

On an object store the creation is a look and a write (`Storage.create`). There this is advisory: two drivers
that start within the same moment may both pass, and the one whose record was overwritten stops at its next
commit (`require`). Every commit carries its owner's number, the epoch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from pbd_ray.config import RunError, UserError, one_line
from pbd_ray.search.process import Process, lives, this_process
from pbd_ray.search.storage import LedgerError, Storage

FOLDER = "owners"

IsFinished = Callable[[str], bool | None]
"""Whether a Ray job has ended; None where nobody knows."""


@dataclass(frozen=True)
class Owner:
    """A driver that writes, or wrote, a run directory."""

    epoch: int
    """1 for the first driver of a directory, one more for each that followed."""
    process: Process
    job: str | None
    """Submission id of its Ray job."""
    started: str
    """UTC."""
    path: str
    inode: int | None
    """Where the directory lay (`Storage.place`)."""
    given_up: bool = False

    def __str__(self) -> str:
        job = f" (Ray job {self.job})" if self.job else ""
        return f"pid {self.process.pid} on {self.process.host}{job} since {self.started}"


@contextlib.contextmanager
def owned(storage: Storage, job: str | None, is_finished: IsFinished) -> Iterator[Owner]:
    """Own a run directory: until the context ends nobody else can.

    A directory in which nothing was written meanwhile is left as it was found.

    Args:
        job: submission id of the Ray job that this process is the driver of.
        is_finished: asked about the job of an owner of which it cannot be seen here whether it lives.

    Raises:
        LedgerError: another driver holds it, or holds it for all that can be known here.
    """
    mine = _take(storage, job, is_finished)
    try:
        yield mine
    except BaseException:
        with contextlib.suppress(UserError, RunError):  # the storage that failed may well fail again
            _give_up(storage, mine)
        raise
    _give_up(storage, mine)


def refuse_held(storage: Storage) -> None:
    """Refuse a directory whose owner is seen to live on this machine. It takes no directory, and of an owner
    elsewhere it says nothing: that is for `owned`.

    Raises:
        LedgerError: another driver holds it.
    """
    holder = _latest(storage)
    if holder is not None and not _is_free(storage, holder) and lives(holder.process):
        raise LedgerError(f"{storage.location} is held by {holder}")


def require(storage: Storage, owner: Owner) -> None:
    """Refuse to go on where the directory is no longer this owner's.

    Raises:
        LedgerError: somebody else holds it, or the record is gone.
    """
    holder = _latest(storage)
    if holder != owner:
        who = "its owner's record is gone" if holder is None else f"{storage.location} is held by {holder}"
        raise LedgerError(f"{who}: this driver, {owner}, writes no more")


def _take(storage: Storage, job: str | None, is_finished: IsFinished) -> Owner:
    try:
        storage.make_root()
        path, inode = storage.place()
        while True:  # each turn but the last was lost to another driver
            holder = _latest(storage)
            if holder is not None:
                _refuse_if_held(storage, holder, is_finished)
            epoch = 1 if holder is None else holder.epoch + 1
            started = datetime.now(UTC).isoformat(timespec="seconds")
            mine = Owner(epoch, this_process(), job, started, path, inode)
            if storage.create(_name(epoch), _to_json(mine)):
                return mine
    except OSError as error:
        raise LedgerError(f"{storage.location} cannot be written: {one_line(error)}") from None


def _refuse_if_held(storage: Storage, holder: Owner, is_finished: IsFinished) -> None:
    if _is_free(storage, holder):
        return
    alive = lives(holder.process)
    if alive is None and holder.job is not None:
        finished = is_finished(holder.job)
        alive = None if finished is None else not finished
    if alive is None:
        raise LedgerError(
            f"{storage.location} is held by {holder}; whether that driver lives cannot be told from here: "
            f"if it does not, delete {storage.uri(_name(holder.epoch))}"
        )
    if alive:
        raise LedgerError(f"{storage.location} is held by {holder}")


def _is_free(storage: Storage, holder: Owner) -> bool:
    """Whether the directory was given up, or is a copy of the one that was taken."""
    path, inode = storage.place()
    copied = holder.path != path and (inode is None or holder.inode != inode)  # either alone may mislead
    return holder.given_up or copied


def _give_up(storage: Storage, mine: Owner) -> None:
    if _latest(storage) != mine:
        return  # somebody deleted the record or the directory
    if mine.epoch == 1 and storage.names() == (_name(mine.epoch),):
        storage.remove_folder(FOLDER)
        storage.remove_empty_root()
    else:
        storage.write(_name(mine.epoch), _to_json(replace(mine, given_up=True)))


def _latest(storage: Storage) -> Owner | None:
    names = [name for name in storage.names(FOLDER) if name.endswith(".json")]
    if not names:
        return None
    last = max(names, key=lambda name: (len(name), name))
    try:
        value = json.loads(storage.read(last))
        owner = Owner(**value | {"process": Process(**value["process"])})
        if last != _name(owner.epoch):  # else the next number might be one that is taken, for ever
            raise ValueError(f"epoch {owner.epoch}")
        return owner
    except FileNotFoundError:
        return None  # deleted since it was listed
    except (ValueError, TypeError, KeyError) as error:
        raise LedgerError(
            f"{storage.uri(last)}: not an owner's record ({one_line(error)}); "
            "if no driver runs there, delete it"
        ) from None


def _name(epoch: int) -> str:
    return f"{FOLDER}/{epoch:04d}.json"


def _to_json(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner), indent=2) + "\n").encode()
