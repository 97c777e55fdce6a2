"""Check that what a run directory says is what was committed."""

from __future__ import annotations

from pbd_ray.search.annotated import recorded_split
from pbd_ray.search.commit import NOT_CHAINED, is_chained
from pbd_ray.search.ledger import Ledger, before
from pbd_ray.search.round_folder import RoundFolder
from pbd_ray.search.state import TEACHER_ROUND
from pbd_ray.search.storage import LedgerError, Storage


def verify(run_dir: str | Storage) -> list[str]:
    """Check every committed round of a run directory; one line for each problem, none if all is well.

    Byte hashes of all files, logical hashes against `result`, the chain of parents from the recipe on, and
    the videos and the quarantine against the environment.

    Raises:
        LedgerError: it is not a run directory.
    """
    ledger = Ledger.existing(run_dir)
    try:
        if ledger.environment() is None:
            return ["environment.json: missing"]
        parent: str | None = ledger.parent_of(TEACHER_ROUND)
    except LedgerError as error:  # without the two files at the root there is no chain to follow
        return [str(error)]
    folders = {name.split("/")[1] for name in ledger.storage.names("rounds") if name.count("/") > 1}
    last = max((int(name) for name in folders if name.isdecimal()), default=TEACHER_ROUND)
    problems: list[str] = []
    for check in (ledger.quarantine, lambda: recorded_split(ledger)):
        try:
            check()
        except LedgerError as error:
            problems.append(str(error))
    for round in range(last + 1):
        found, parent = _check(ledger.round(round), parent, is_last=round == last)
        problems += found
    return problems


def _check(folder: RoundFolder, parent: str | None, is_last: bool) -> tuple[list[str], str | None]:
    """Problems of one round, and its result: the parent the next round must name."""
    where = f"{folder.name}/commit.json"
    try:
        commit = folder.read_commit()
    except LedgerError:
        return [f"{where}: not a commit"], None
    if commit is None:  # the open round, unless others follow
        return ([] if is_last else [f"{where}: missing"]), None
    there, listed = folder.files(), commit["files"]
    problems = [f"{folder.name}/{name}: missing" for name in sorted(listed.keys() - there.keys())]
    problems += [f"{folder.name}/{name}: not in the commit" for name in sorted(there.keys() - listed.keys())]
    problems += [
        f"{folder.name}/{name}: bytes differ from the commit"
        for name in sorted(there.keys() & listed.keys())
        if there[name] != listed[name]
    ]
    if commit["parent"] != parent:
        problems.append(f"{where}: parent is not {before(folder)}")
    if not is_chained(folder.round, commit):
        problems.append(f"{where}: {NOT_CHAINED}")
    if not problems:
        try:
            parts = folder.parts()
        except LedgerError as error:
            return [str(error)], commit["result"]
        problems = [
            f"{folder.name}: {part} is not what the commit says"
            for part in sorted(parts)
            if parts[part] != commit["parts"].get(part)
        ]
    return problems, commit["result"]
