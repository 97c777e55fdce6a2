"""Sweeps of a round as the ledger knows them: planned once, each slice run once, read back whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Annotations
from pbd_ray.search.round_folder import RoundFolder
from pbd_ray.search.slices import plan_slices, slice_count
from pbd_ray.search.state import TEACHER_ROUND, Slice, Sweep, SweepKind, SweepTask

Report = Callable[[str], None]
"""Takes one line of progress for a person to read."""


@dataclass(frozen=True)
class Sweeper:
    """Runs what is missing of a sweep."""

    recipe: Recipe
    sweep: Sweep
    report: Report

    def rows(self, folder: RoundFolder, kind: SweepKind, task: SweepTask, videos: Annotations) -> pa.Table:
        """All rows of a sweep over `videos`; only slices that are not on disk are run.

        Raises:
            RuntimeError: the sweep ended with slices missing.
        """
        plan = folder.read_plan(kind)
        if plan is None:
            grid = self.recipe.experiment.detector.grid
            plan = plan_slices(videos.videos, grid, slice_count(self.recipe.execution))
            folder.write_plan(kind, task, plan)
        done = set(folder.slices_done(kind))
        pending = [piece for piece in plan if piece.index not in done]

        def on_slice(piece: Slice, table: pa.Table) -> None:
            if piece.index not in done:  # a slice given out twice counts once
                folder.write_slice(kind, piece, table)
                done.add(piece.index)

        if pending:
            self.report(f"{label(folder.round)}: {kind}, {len(pending)} of {len(plan)} slices to do")
            with measuring(folder, kind, resumed=len(pending) < len(plan)) as measured:
                measured |= self.sweep(task, pending, on_slice) or {}
            missing = [piece.index for piece in plan if piece.index not in done]
            if missing:  # an interrupted cluster run may end without an error
                raise RuntimeError(f"sweep {task.name} ended without slices {missing}")
        return folder.read_slices(kind)


@contextmanager
def measuring(folder: RoundFolder, stage: str, resumed: bool = False) -> Iterator[dict[str, Any]]:
    """Time a stage into measured.json, along with the facts the caller puts into the mapping given.

    Of a stage that a killed driver had begun, only the last part is timed: then `resumed` is true there.
    """
    facts: dict[str, Any] = {}
    begin = time.perf_counter()
    yield facts
    seconds = time.perf_counter() - begin
    stored = folder.read_measured()
    stages = stored.get("stages", {}) | {stage: {"seconds": seconds, "resumed": resumed, **facts}}
    folder.write_measured(stored | {"stages": stages})


def label(round: int) -> str:
    """A round's name in lines of progress."""
    return "teacher" if round == TEACHER_ROUND else f"round {round}"
