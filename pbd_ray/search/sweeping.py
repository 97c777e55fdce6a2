"""Sweeps of a round as the ledger knows them: planned once, each slice run once, read back whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pbd_ray.compression.candidates import SweepRows
from pbd_ray.config import Execution, Recipe
from pbd_ray.data.annotations import Annotations
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.race import Verdict, is_raced, judge, plan_race, videos_by_stage, videos_of_arms
from pbd_ray.search.round_folder import RoundFolder
from pbd_ray.search.slices import plan_slices, slice_count
from pbd_ray.search.state import TEACHER_ROUND, Sweep, SweepKind, SweepTask

Report = Callable[[str], None]
"""Takes one line of progress for a person to read."""


@dataclass(frozen=True)
class Sweeper:
    """Runs what is missing of a sweep."""

    recipe: Recipe
    sweep: Sweep
    report: Report

    def rows(
        self,
        folder: RoundFolder,
        kind: SweepKind,
        task: SweepTask,
        videos: Annotations,
        watch: Callable[[SweepRows, bool], None] | None = None,
    ) -> SweepRows:
        """The rows of a sweep over `videos`; only slices that are not on disk are run.

        Candidates for the drop race, where the recipe lets them; those of a tie do not.

        Args:
            watch: told at every barrier how those in the race stand, `stopped` being who leaves it, and, as
                final, how all stand at the end. That is part of the sweep's time: its workers are held.

        Raises:
            RuntimeError: the sweep ended with slices missing.
        """
        experiment, count = self.recipe.experiment, slice_count(self.recipe.execution)
        raced = kind == "scores" and is_raced(experiment, task.criterion)
        plan = folder.read_plan(kind)
        if plan is None:
            if raced:
                plan = plan_race(videos, experiment, folder.round, count)
            else:
                plan = plan_slices(videos.videos, experiment.detector.grid, count)
            folder.write_plan(kind, task, plan)

        def at_barrier(stage: int, alive: tuple[int, ...]) -> tuple[int, ...]:
            assert watch is not None
            names = seen[stage]
            rows = folder.read_slices(kind, (piece.index for piece in plan if piece.stage <= stage))
            standing = SweepRows(task.criterion, rows, dict.fromkeys(alive, names))
            verdict = judge(standing, experiment, videos, folder.round, stage, of=len(seen) - 1)
            self.report(barrier_line(folder.round, verdict, len(names), len(seen[-1])))
            watch(replace(standing, stopped=frozenset(verdict.stopped)), False)
            return tuple(block for block in alive if block not in verdict.stopped)

        seen = videos_by_stage(plan)
        feed = SliceFeed(
            plan,
            task.candidates,
            folder.slices_done(kind),
            lambda work, table: folder.write_slice(kind, work, table),
            at_barrier if raced else None,
        )

        def at_end() -> SweepRows:
            if not feed.ended:  # an interrupted cluster run may end without an error
                raise RuntimeError(f"sweep {task.name} ended with {1 - feed.seen:.0%} of its videos missing")
            whole = SweepRows(
                task.criterion,
                folder.read_slices(kind),
                videos_of_arms(plan, feed.raced, task.candidates, undropped=task.criterion != "mse"),
                frozenset(task.candidates) - frozenset(feed.alive),
            )
            if watch is not None:
                watch(whole, True)
            return whole

        if feed.ended:
            return at_end()
        share = "" if feed.seen == 0 else f", {feed.seen:.0%} of them on record"
        self.report(f"{label(folder.round)}: {kind}, {len(seen[-1])} videos{share}")
        with measuring(folder, kind, self.recipe.execution) as measured:
            measured |= self.sweep(task, feed) or {}
            whole = at_end()
        return whole


def barrier_line(round: int, verdict: Verdict, videos: int, of: int) -> str:
    """A barrier for a person to read."""
    best = next(lag.block for lag in verdict.lags if lag.behind == 0)
    who = f"stops blocks {', '.join(map(str, verdict.stopped))}" if verdict.stopped else "stops none"
    left = len(verdict.lags) - len(verdict.stopped)
    return f"{label(round)}: race {who} after {videos} of {of} videos; {left} left, block {best} leads"


@contextmanager
def measuring(folder: RoundFolder, stage: str, execution: Execution) -> Iterator[dict[str, Any]]:
    """Time a stage into measured.json, along with what a worker of it held and the facts that the caller puts
    into the mapping given. Another start of the run may have workers of another size.

    Of a stage that a killed driver had begun, only the last part is timed: then `resumed` is true there.
    """
    stored = folder.read_measured()
    before = stored.get("begun", [])
    resumed = stage in before
    if not resumed:
        folder.write_measured(stored | {"begun": [*before, stage]})
    facts: dict[str, Any] = {}
    begin = time.perf_counter()
    yield facts
    seconds = time.perf_counter() - begin
    stored = folder.read_measured()
    held = {
        "cpus_per_worker": execution.cpus_per_worker,
        "gpus_per_worker": execution.gpus_per_worker,
        "train_workers": execution.train_workers,
    }
    stages = stored.get("stages", {}) | {stage: {"seconds": seconds, "resumed": resumed, **held, **facts}}
    folder.write_measured(stored | {"stages": stages})


def stage_of(task: SweepTask) -> str:
    """Which of its round's sweeps a task is: scores, tie, evaluation, selection."""
    return task.name.rpartition("-")[2]


def label(round: int) -> str:
    """A round's name in lines of progress."""
    return "teacher" if round == TEACHER_ROUND else f"round {round}"
