"""The files of one round: which there are, what they hold, and which one says that a stage is done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pbd_ray.config import one_line
from pbd_ray.search import records
from pbd_ray.search.commit import is_commit, result_hash
from pbd_ray.search.hashing import bytes_hash, table_hash, value_hash
from pbd_ray.search.sealed import Sealed
from pbd_ray.search.state import (
    TEACHER_ROUND,
    Decision,
    Evaluation,
    RoundRecord,
    Slice,
    SweepKind,
    SweepTask,
    Work,
)
from pbd_ray.search.storage import LedgerError, Storage

BUNDLE_FILES = ("model.safetensors", "config.json")
"""In the order they are written: where config.json is, the weights are."""


class RoundFolder:
    """rounds/NN, or teacher/ for round 0. Once commit.json is there every write is refused, and what is read
    must be what was committed.

    Raises, where it reads:
        LedgerError: a file does not hold what it should.
    """

    def __init__(self, storage: Storage, round: int) -> None:
        self.storage = storage
        self.round = round
        self.name = "teacher" if round == TEACHER_ROUND else f"rounds/{round:02d}"
        self.bundle = self.name if round == TEACHER_ROUND else f"{self.name}/model"
        self._sealed: Sealed | None = None

    def begun(self) -> bool:
        """Whether anything of the round is on disk."""
        return bool(self.storage.names(self.name))

    def read_plan(self, kind: SweepKind) -> tuple[Slice, ...] | None:
        value = self._read_json(f"{kind}/plan.json")
        with self._understanding(f"{kind}/plan.json"):
            return None if value is None else records.slices_from_json(value)

    def write_plan(self, kind: SweepKind, task: SweepTask, slices: Sequence[Slice]) -> None:
        self._write_json(f"{kind}/plan.json", records.plan_to_json(task, slices))

    def slices_done(self, kind: SweepKind) -> frozenset[int]:
        """Indices of the slices on disk."""
        names = [name.rpartition("/")[2] for name in self._slice_names(kind)]
        return frozenset(int(name.removesuffix(".parquet")) for name in names)

    def write_slice(self, kind: SweepKind, work: Work, table: pa.Table) -> None:
        """The rows, and in the schema's metadata the candidates that they are of."""
        facts = {"candidates": json.dumps(work.candidates)}
        self._write_table(_slice_name(kind, work.piece.index), table, facts)

    def read_slices(self, kind: SweepKind, indices: Iterable[int] | None = None) -> pa.Table:
        """Rows of a sweep, of all its slices or some, grouped by video in the order of ids.

        A video lies in one slice, so how the sweep was sliced does not show. Slices of a race may hold
        rows of candidates that were stopped while they were being scored.
        """
        names = (
            self._slice_names(kind)
            if indices is None
            else [f"{self.name}/{_slice_name(kind, index)}" for index in sorted(indices)]
        )
        tables = [self._files.read_table(name).replace_schema_metadata(None) for name in names]
        with self._understanding(kind):
            return pa.concat_tables(tables).sort_by("video").combine_chunks()  # Arrow's sort is stable

    def write_decision(self, decision: Decision) -> None:
        """The scores first, decision.json last: it means that the stage is done."""
        self._write_table("scores.parquet", records.scores_to_table(decision.scores))
        self._write_json("decision.json", records.decision_to_json(decision))

    def read_decision(self) -> Decision | None:
        value = self._read_json("decision.json")
        if value is None:
            return None
        table = self._read_table("scores.parquet")
        with self._understanding("scores.parquet"):
            scores = records.scores_from_table(table)
        with self._understanding("decision.json"):
            return records.decision_from_json(value, scores)

    def write_alignment(
        self, bundle: Mapping[str, bytes], learning_rate: float | None, epoch: int, curves: pa.Table
    ) -> None:
        """The bundle first, alignment.parquet last: it means that the stage is done.

        The learning rate and epoch chosen stand in its schema metadata.
        """
        self.write_bundle(bundle)
        facts = {"learning_rate": json.dumps(learning_rate), "epoch": json.dumps(epoch)}
        self._write_table("alignment.parquet", curves, facts)

    def read_alignment(self) -> tuple[float | None, int, pa.Table] | None:
        """(learning rate, epoch, curves), or None where the stage is not done."""
        if not self._files.exists(f"{self.name}/alignment.parquet"):
            return None
        table = self._read_table("alignment.parquet")
        curves = table.replace_schema_metadata(None)
        with self._understanding("alignment.parquet"):
            facts = table.schema.metadata or {}
            return json.loads(facts[b"learning_rate"]), json.loads(facts[b"epoch"]), curves

    def write_bundle(self, bundle: Mapping[str, bytes]) -> None:
        """The files of a bundle, config.json last."""
        assert set(bundle) == set(BUNDLE_FILES), f"a bundle is {BUNDLE_FILES}, got {sorted(bundle)}"
        for name in BUNDLE_FILES:
            self._refuse_if_committed(name)
            self.storage.write(f"{self.bundle}/{name}", bundle[name])

    def read_bundle(self) -> dict[str, bytes] | None:
        """The files of the round's bundle; None where it is not there yet."""
        if not self._files.exists(f"{self.bundle}/config.json"):
            return None
        return {name: self._files.read(f"{self.bundle}/{name}") for name in BUNDLE_FILES}

    def write_evaluation(self, evaluation: Evaluation) -> None:
        self._write_json("evaluation.json", records.evaluation_to_json(evaluation))

    def read_evaluation(self) -> Evaluation | None:
        value = self._read_json("evaluation.json")
        with self._understanding("evaluation.json"):
            return None if value is None else records.evaluation_from_json(value)

    def write_measured(self, measured: Mapping[str, Any]) -> None:
        self._write_json("measured.json", dict(measured))

    def read_measured(self) -> dict[str, Any]:
        """Everything measured and not computed: it enters no `result` hash."""
        return self._read_json("measured.json") or {}

    def parts(self) -> dict[str, str]:
        """Hashes of the logical content of the round's files, all but the weights."""
        parts = {"evaluation": value_hash(self._read_json("evaluation.json"))}
        if self.round == TEACHER_ROUND:
            return parts
        alignment = self.read_alignment()
        if alignment is None:
            raise LedgerError(f"{self.storage.uri(self.name)}/alignment.parquet is missing")
        learning_rate, epoch, curves = alignment
        return parts | {
            "scores": table_hash(self._read_table("scores.parquet")),
            "decision": value_hash(self._read_json("decision.json")),
            "alignment": value_hash([learning_rate, epoch, table_hash(curves)]),
        }

    def files(self) -> dict[str, str]:
        """SHA-256 of the bytes of every file but commit.json, by its name inside the folder."""
        names = [name for name in self.storage.names(self.name) if name != f"{self.name}/commit.json"]
        return {name.removeprefix(f"{self.name}/"): bytes_hash(self.storage.read(name)) for name in names}

    def write_commit(self, parent: str, weights_hash: str, epoch: int | None) -> None:
        """Close the round for good: one atomic write.

        `result` covers decision, scores, losses, mAP, weights and the parent's result; `files` are byte
        hashes for `verify`; `epoch` says which owner wrote the commit and is not part of `result`.
        """
        parts = self.parts() | {"weights": weights_hash}
        value = {
            "round": self.round,
            "epoch": epoch,
            "parent": parent,
            "result": result_hash(self.round, parent, parts),
            "parts": parts,
            "files": self.files(),
        }
        self._write_json("commit.json", value)

    def read_commit(self) -> dict[str, Any] | None:
        """The commit; None where the round is open.

        Raises:
            LedgerError: the file is not a commit.
        """
        value: dict[str, Any] | None = self.storage.read_json(f"{self.name}/commit.json")
        if value is not None and not is_commit(value):
            raise LedgerError(f"{self.storage.uri(self.name)}/commit.json: not a commit")
        return value

    def read_record(self) -> RoundRecord:
        """The round as committed."""
        commit, evaluation = self.read_commit(), self.read_evaluation()
        assert commit is not None and evaluation is not None, f"{self.name} is not committed"
        learning_rate, epoch, curves = self.read_alignment() or (None, None, None)
        return RoundRecord(
            round=self.round,
            parent=commit["parent"],
            result=commit["result"],
            evaluation=evaluation,
            decision=self.read_decision(),
            learning_rate=learning_rate,
            epoch=epoch,
            curves=curves,
            measured=self.read_measured(),
        )

    def _slice_names(self, kind: SweepKind) -> list[str]:
        return [name for name in self._files.names(f"{self.name}/{kind}") if name.endswith(".parquet")]

    @property
    def _files(self) -> Storage:
        """Where the round is read from."""
        if self._sealed is None and (commit := self.read_commit()) is not None:
            self._sealed = Sealed(self.storage, self.name, commit["files"])
        return self._sealed or self.storage

    @contextmanager
    def _understanding(self, name: str) -> Iterator[None]:
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            where = self.storage.uri(f"{self.name}/{name}")
            problem = f"{type(error).__name__} {one_line(error)}"
            raise LedgerError(f"{where}: not what a round has there: {problem}") from None

    def _read_json(self, name: str) -> Any:
        return self._files.read_json(f"{self.name}/{name}")

    def _read_table(self, name: str) -> pa.Table:
        return self._files.read_table(f"{self.name}/{name}")

    def _write_json(self, name: str, value: Any) -> None:
        self._refuse_if_committed(name)
        self.storage.write_json(f"{self.name}/{name}", value)

    def _write_table(self, name: str, table: pa.Table, facts: Mapping[str, str] | None = None) -> None:
        self._refuse_if_committed(name)
        self.storage.write_table(f"{self.name}/{name}", table, facts)

    def _refuse_if_committed(self, name: str) -> None:
        if self.storage.exists(f"{self.name}/commit.json"):
            raise LedgerError(f"{self.storage.uri(self.name)} is committed: {name} cannot be written")


def _slice_name(kind: SweepKind, index: int) -> str:
    return f"{kind}/{index:04d}.parquet"
