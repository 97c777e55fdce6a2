"""What is written: the run directory, the only truth of a run (design, section 4, State).

The driver may die at any line. Every file is written atomically, a stage counts as done when its last
file is there, a round when its commit.json is there and names its parent's result. Finished rounds are
immutable.

    recipe.yaml, environment.json
    quarantine.json  videos that the run leaves out, decided at its first start (data/quarantine.py)
    videos.parquet   the others, as they are annotated (search/annotated.py)
    owners/        one file a driver that ever wrote here (search/owner.py)
    teacher/       round 0: config.json + model.safetensors, evaluation/, evaluation.json, commit.json
    rounds/01/     scores/ (plan.json, one Parquet a slice), scores.parquet, decision.json, model/ (bundle),
                   alignment.parquet, evaluation/, evaluation.json, measured.json, commit.json
    ray/           storage of the open round's cluster runs
    plan/          plan.json, what the run was expected to take, where that was asked before it began
    summary.json
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import ValidationError

from pbd_ray.config import Recipe, differences, experiment_hash, one_line
from pbd_ray.data.quarantine import NOTHING, Quarantine, quarantine_from_json, quarantine_to_json
from pbd_ray.report.forecast import Forecast, forecast_from_json, resources_of
from pbd_ray.search.commit import NOT_CHAINED, is_chained
from pbd_ray.search.environment import Environment, exactness_changes
from pbd_ray.search.hashing import value_hash
from pbd_ray.search.owner import FOLDER as OWNERS
from pbd_ray.search.owner import Owner, require
from pbd_ray.search.round_folder import RoundFolder
from pbd_ray.search.state import TEACHER_ROUND, RoundRecord
from pbd_ray.search.storage import LedgerError, Storage

__all__ = ["Ledger", "LedgerError"]

SCRATCH = "ray"
PLAN = "plan"
QUARANTINE = "quarantine.json"


class Ledger:
    """Reads and writes one run directory. Only the driver writes, and only one driver at a time."""

    def __init__(self, storage: Storage, owner: Owner | None = None) -> None:
        self.storage = storage
        self.owner = owner
        """None where nobody else can be there: then commits name no epoch."""

    @classmethod
    def open(cls, run_dir: str | Storage, recipe: Recipe, owner: Owner | None = None) -> Ledger:
        """Begin a run in an empty or missing directory, or go on with the one that is there.

        The experiment must be the directory's own; `execution` may differ and is written down anew.

        Args:
            owner: this driver's record, from `owner.owned`.

        Raises:
            LedgerError: another experiment's directory, or one with files but no recipe.yaml.
        """
        storage = cls.refuse_other(run_dir, recipe).storage
        ledger = cls(storage, owner)
        storage.sweep(recursive=False)
        storage.sweep("teacher")
        storage.sweep("rounds")
        text = recipe.to_yaml().encode()
        if not storage.exists("recipe.yaml") or storage.read("recipe.yaml") != text:
            storage.write("recipe.yaml", text)
        return ledger

    @classmethod
    def refuse_other(cls, run_dir: str | Storage, recipe: Recipe) -> Ledger:
        """The checks of `open` alone: nothing is written.

        Raises:
            LedgerError: as `open`.
        """
        storage = Storage.at(run_dir) if isinstance(run_dir, str) else run_dir
        ledger = cls(storage)
        if storage.exists("recipe.yaml"):
            changed = differences(ledger.recipe().experiment, recipe.experiment)
            if changed:
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                shown = "; ".join(changed[:3])
                raise LedgerError(f"{storage.uri('recipe.yaml')} holds another experiment: {shown}{more}")
        elif found := [name for name in storage.names() if not name.startswith((f"{OWNERS}/", f"{PLAN}/"))]:
            raise LedgerError(
                f"{storage.location} has files ({found[0]}) but no recipe.yaml: not a run directory"
            )
        return ledger

    @classmethod
    def existing(cls, run_dir: str | Storage) -> Ledger:
        """The ledger of a run directory that must be there, for reading.

        Raises:
            LedgerError: there is no recipe.yaml.
        """
        storage = Storage.at(run_dir) if isinstance(run_dir, str) else run_dir
        if not storage.exists("recipe.yaml"):
            raise LedgerError(f"{storage.uri('recipe.yaml')} is missing: not a run directory")
        return cls(storage)

    def round(self, round: int) -> RoundFolder:
        """The files of a round; round 0 is the teacher."""
        return RoundFolder(self.storage, round)

    @property
    def teacher(self) -> RoundFolder:
        return self.round(TEACHER_ROUND)

    def recipe(self) -> Recipe:
        """The run's experiment, and the execution of the latest start.

        Raises:
            LedgerError: recipe.yaml is not a recipe.
        """
        name = f"{self.storage.uri('recipe.yaml')}"
        try:
            return Recipe.model_validate(yaml.safe_load(self.storage.read("recipe.yaml")))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in problem["loc"]) or "recipe"
            raise LedgerError(f"{name}: {key}: {problem['msg']}") from None
        except (yaml.YAMLError, ValueError) as error:  # of a text that looks like a date, a ValueError
            raise LedgerError(f"{name}: not valid YAML: {one_line(error)}") from None

    def record_environment(self, environment: Environment, computes: bool = True) -> tuple[str, ...]:
        """Write down the first start's environment, or what differs from it in this start.

        Args:
            computes: whether anything is left to compute; else what differs says nothing of the run.

        Returns lines `key: first -> now`; none if this start can end bit for bit as the first would.

        Raises:
            LedgerError: the annotations or the teacher are not the ones the run began with.
        """
        now = environment.to_json()
        stored = self.environment()
        if stored is None:
            self.storage.write_json("environment.json", {"first": now, "changes": []})
            return ()
        for key, what in (("data_hash", "annotations"), ("teacher_hash", "teacher's weights")):
            before = stored["first"][key]
            if before != now[key]:
                raise LedgerError(
                    f"{self.storage.uri('environment.json')}: the {what} are not those the run began with "
                    f"({key} {before[:12]}, now {now[key][:12]})"
                )
        changes = exactness_changes(stored["first"], now) if computes else ()
        if changes and list(changes) not in stored["changes"]:
            stored["changes"].append(list(changes))
            self.storage.write_json("environment.json", stored)
        return changes

    def environment(self) -> dict[str, Any] | None:
        """`first`: the environment of the first start; `changes`: what differed in later ones.

        Raises:
            LedgerError: the file says something else.
        """
        value: dict[str, Any] | None = self.storage.read_json("environment.json")
        if value is not None and not _is_environment(value):
            raise LedgerError(f"{self.storage.uri('environment.json')}: not an environment")
        return value

    def record_quarantine(self, quarantine: Quarantine) -> None:
        """Write down what the first start leaves out; the record that is there is never touched."""
        if not self.storage.exists(QUARANTINE):
            self.storage.write_json(QUARANTINE, quarantine_to_json(quarantine))

    def quarantine(self) -> Quarantine | None:
        """What the first start left out; None before it was decided.

        Raises:
            LedgerError: the record is gone, is something else, or is not the one the run began with.
        """
        value, environment = self.storage.read_json(QUARANTINE), self.environment()
        if value is None and environment is None:
            return None
        name = self.storage.uri(QUARANTINE)
        try:
            found = NOTHING if value is None else quarantine_from_json(value)
        except ValueError as error:
            raise LedgerError(f"{name}: not a quarantine: {error}") from None
        if environment is not None and environment["first"].get("quarantine_hash") != quarantine_hash(found):
            raise LedgerError(f"{name}: not the one the run began with")
        return found

    def commit(self, round: int, weights_hash: str) -> RoundRecord:
        """Close a round for good, chained to the round before.

        Raises:
            LedgerError: the parent is not committed, or the round is, or another driver has taken over.
        """
        if self.owner is not None:
            require(self.storage, self.owner)
        parent = self.parent_of(round)
        if parent is None:
            raise LedgerError(f"{self.storage.uri(self.round(round - 1).name)} is not committed")
        folder = self.round(round)
        folder.write_commit(parent, weights_hash, None if self.owner is None else self.owner.epoch)
        return folder.read_record()

    def parent_of(self, round: int) -> str | None:
        """Result of the round before, None if it is open; the teacher's: the experiment on its data."""
        if round > TEACHER_ROUND:
            commit = self.round(round - 1).read_commit()
            return None if commit is None else str(commit["result"])
        environment = self.environment()
        assert environment is not None, "the environment is recorded before the teacher is committed"
        experiment = experiment_hash(self.recipe().experiment)
        return value_hash({"experiment": experiment, "data": environment["first"]["data_hash"]})

    def committed(self) -> tuple[RoundRecord, ...]:
        """The committed rounds in order, the teacher first; empty where not even it is committed.

        Raises:
            LedgerError: a commit does not name its parent's result, or its own is not that of its parts, or a
                file is not what was committed: the directory was altered.
        """
        found: list[RoundRecord] = []
        while (commit := self.round(len(found)).read_commit()) is not None:
            folder = self.round(len(found))
            name = self.storage.uri(f"{folder.name}/commit.json")
            if commit["parent"] != self.parent_of(folder.round):
                raise LedgerError(f"{name}: parent is not {before(folder)}")
            if not is_chained(folder.round, commit):
                raise LedgerError(f"{name}: {NOT_CHAINED}")
            found.append(folder.read_record())
        return tuple(found)

    def scratch_uri(self) -> str:
        """Where the cluster may keep what it needs to resume the open round (a path or URI)."""
        return self.storage.uri(SCRATCH)

    def discard_scratch(self) -> None:
        """Delete the cluster's storage: after a commit nothing in it is needed."""
        self.storage.remove_folder(SCRATCH)

    def write_plan(self, plan: Forecast) -> None:
        self.storage.write_json(f"{PLAN}/plan.json", plan.to_json())

    def plan(self, recipe: Recipe) -> Forecast | None:
        """What this experiment was expected to take with these workers; None where nobody asked before it
        began.

        Raises:
            LedgerError: the file says something else.
        """
        name = f"{PLAN}/plan.json"
        value = self.storage.read_json(name)
        asked = (experiment_hash(recipe.experiment), resources_of(recipe.execution))
        try:
            if value is None or (value["experiment"], value["resources"]) != asked:
                return None
            return forecast_from_json(value)
        except (KeyError, TypeError) as error:
            where = self.storage.uri(name)
            raise LedgerError(f"{where}: not a plan of this version: {error}; delete it") from None

    def write_summary(self, summary: dict[str, Any]) -> None:
        self.storage.write_json("summary.json", summary)


def quarantine_hash(quarantine: Quarantine | None) -> str:
    """SHA-256 of the record; of None as of one that names nothing."""
    return value_hash(quarantine_to_json(quarantine or NOTHING))


def _is_environment(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("changes"), list)
        and isinstance(value.get("first"), dict)
        and value["first"].keys() >= {"data_hash", "teacher_hash"}
    )


def before(folder: RoundFolder) -> str:
    """What a round's parent must be, in words."""
    if folder.round == TEACHER_ROUND:
        return "this experiment (recipe.yaml) on its data (environment.json)"
    return f"the result of round {folder.round - 1}"
