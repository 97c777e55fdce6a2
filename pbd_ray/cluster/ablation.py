"""The paper's supplementary experiments from a recipe to their tables: what `jobs/ablate.py` calls.

The output directory is a run directory without rounds of its own:

    recipe.yaml, quarantine.json, owners/   as of any run (search/ledger.py)
    teacher/           the bundle that all runs start from, and its evaluation
    arms/NAME-seedK/   a run directory each
    tables/            one CSV and one Parquet file a table
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from pyarrow import csv

from pbd_ray.cluster.ablation_sweep import Outcomes, run_here, run_on_ray
from pbd_ray.cluster.backend import alone_in_cluster, backend, backend_steps, fit_uncompressed
from pbd_ray.cluster.holder import job_finished, submission_id
from pbd_ray.cluster.inputs import given_teacher
from pbd_ray.cluster.monitoring import say
from pbd_ray.cluster.places import check_places
from pbd_ray.cluster.preflight import usable_videos
from pbd_ray.cluster.session import sigterm_as_interrupt
from pbd_ray.compression.blocks import Model
from pbd_ray.config import Recipe, RunError, changed
from pbd_ray.data.annotations import Annotations, Split
from pbd_ray.data.quarantine import Quarantine
from pbd_ray.data.source import VideoSource, load_split
from pbd_ray.report.ablation import AblationTable, ablation_text, arrow_table
from pbd_ray.search.ablation import OURS, Run, run_recipe
from pbd_ray.search.ablation_results import RunReader, ablation_table
from pbd_ray.search.ablation_run import RunTask, Shared
from pbd_ray.search.ablation_tables import TablePlan, runs_of
from pbd_ray.search.footprint import compression_footprint
from pbd_ray.search.hashing import weights_hash
from pbd_ray.search.ledger import Ledger, LedgerError
from pbd_ray.search.owner import Owner, owned
from pbd_ray.search.packing import Packing, model_of
from pbd_ray.search.state import TEACHER_ROUND, SweepTask
from pbd_ray.search.storage import Storage
from pbd_ray.search.sweeping import Sweeper


def run_ablation(base: Recipe, plan: Sequence[TablePlan]) -> tuple[AblationTable, ...]:
    """Run what is missing of the tables; write and print them.

    Args:
        base: from `search.ablation.ablation_recipe`; its run_dir is the output directory.

    Raises:
        UserError: what the user can mend.
        RunError: runs failed; the others are done, and the tables are made of them.
    """
    storage = Ledger.refuse_other(base.run_dir, base).storage
    free = [run for run in runs_of(plan) if run.arm.kind == "free"]
    for run in free:
        _task(base, run, None)  # refuses what is there of another ablation, before anything is started
    finished = job_finished(base.execution.ray_address)
    with sigterm_as_interrupt(), owned(storage, submission_id(), finished) as owner:
        outcomes, test = _run_all(base, plan, storage, owner)
        tables = _tables(base, plan, storage, test)
    failed = [f"{name}: {reason}" for name, reason in outcomes.items() if reason is not None]
    if failed:
        raise RunError(f"{len(failed)} runs failed ({'; '.join(failed)}); the same command goes on from here")
    return tables


def _run_all(
    base: Recipe, plan: Sequence[TablePlan], storage: Storage, owner: Owner
) -> tuple[Outcomes, Annotations]:
    """Everything that is not on record, in two sweeps: the second needs what our method dropped.

    Returns:
        What became of the runs, and the test videos.
    """
    split = load_split(base, say)
    teacher = given_teacher(base, split)
    workers = 1 if teacher is not None else base.execution.train_workers
    with backend(base, workers), alone_in_cluster(base, storage, owner):
        check_places(base, storage, _bytes(base, plan, split))
        split, source, left_out = usable_videos(base, split, Ledger(storage).quarantine())
        ledger = Ledger.open(storage, base, owner)
        ledger.record_quarantine(left_out)
        teacher = _the_teacher(base, split, source, ledger, teacher)
        evaluation = _evaluated(base, split, source, ledger, model_of(teacher, "teacher"))
        shared = Shared(_splits(base, plan, split, left_out), teacher, evaluation, left_out)
        runs = runs_of(plan)
        outcomes: dict[str, str | None] = {}
        for sweep, first in (("free", True), ("following", False)):
            tasks = []
            for run in (run for run in runs if (run.arm.kind == "free") is first):
                order = None if first else _order(base, run.seed)
                if not first and order is None:
                    outcomes[run.name] = f"needs {Run(OURS, run.seed).name}"
                else:
                    tasks.append(_task(base, run, order))
            open_tasks = [task for task in tasks if not task.finished]
            say(f"ablation, {sweep} runs: {len(tasks)}, {len(tasks) - len(open_tasks)} on record")
            if open_tasks and base.execution.backend == "local":
                outcomes |= run_here(open_tasks, shared, base.execution)
            elif open_tasks:
                scratch = ledger.scratch_uri()
                outcomes |= run_on_ray(open_tasks, shared, f"ablation-{sweep}", scratch, base.execution)
            ledger.discard_scratch()
    return outcomes, split.test


def _place(base: Recipe, run: Run) -> str:
    return Storage.at(base.run_dir).uri(f"arms/{run.name}")


def _task(base: Recipe, run: Run, order: Sequence[int] | None) -> RunTask:
    """
    Raises:
        LedgerError: the run's directory holds another experiment.
    """
    swaps = _place(base, Run(OURS, run.seed)) if run.arm.kind == "swapped" else None
    task = RunTask(run.name, run_recipe(base, run, _place(base, run), order), swaps)
    Ledger.refuse_other(task.recipe.run_dir, task.recipe)
    return task


def _order(base: Recipe, seed: int) -> list[int] | None:
    """Blocks that our method dropped; None where it has not come to its end."""
    ours = Run(OURS, seed)
    if not _task(base, ours, None).finished:
        return None
    records = Ledger.existing(_place(base, ours)).committed()
    return [record.decision.dropped_block for record in records if record.decision is not None]


def _the_teacher(
    base: Recipe, split: Split, source: VideoSource, ledger: Ledger, given: Mapping[str, bytes] | None
) -> Mapping[str, bytes]:
    """The bundle that all runs start from: the one on record, else the one given, else one fitted now.

    Raises:
        LedgerError: another one is given than is on record.
    """
    stored = ledger.teacher.read_bundle()
    if stored is None:
        files = given
        if files is None:
            fitted = fit_uncompressed(base, split, source, ledger.scratch_uri())
            packing = Packing(base.experiment.detector, split.fit.classes)
            files = packing.files(fitted.model, {"experiment": base.experiment.name})
        ledger.teacher.write_bundle(files)
        return files
    if given is not None:
        ours, theirs = (weights_hash(model_of(files, "teacher").weights) for files in (stored, given))
        if ours != theirs:
            raise LedgerError(f"{ledger.storage.uri('teacher')} holds another teacher than the one given")
    return stored


def _evaluated(
    base: Recipe, split: Split, source: VideoSource, ledger: Ledger, teacher: Model
) -> Mapping[str, bytes]:
    """The teacher's detections on the test videos: once for all runs. The plan first, for slices without one
    would count for another plan."""
    task = SweepTask("teacher-evaluation", TEACHER_ROUND, teacher, (), "map", "test")
    with backend_steps(base, split, source, ledger.scratch_uri()) as steps:
        Sweeper(base, steps.sweep, say).rows(ledger.teacher, "evaluation", task, split.test)
    folder, storage = f"{ledger.teacher.name}/evaluation", ledger.storage
    names = sorted(storage.names(folder), key=lambda name: (not name.endswith("plan.json"), name))
    return {name: storage.read(name) for name in names}


def _splits(base: Recipe, plan: Sequence[TablePlan], split: Split, left_out: Quarantine) -> dict[int, Split]:
    """By seed, which may draw the selection videos; with what was found out about each video's file."""
    looked_at = {video.id: video for video in split.everything().videos}
    splits = {}
    for seed in {run.seed for run in runs_of(plan)}:
        drawn = left_out.without(load_split(changed(base, {"seed": seed}), lambda line: None))
        splits[seed] = drawn.map(lambda video: looked_at[video.id])
    return splits


def _bytes(base: Recipe, plan: Sequence[TablePlan], split: Split) -> int:
    """What all runs write at most; which blocks they drop makes no difference."""
    blocks = range(base.experiment.max_drops)
    recipes = [run_recipe(base, run, _place(base, run), blocks) for run in runs_of(plan)]
    return sum(compression_footprint(recipe.experiment, split).total for recipe in recipes)


def _tables(
    base: Recipe, plan: Sequence[TablePlan], storage: Storage, test: Annotations
) -> tuple[AblationTable, ...]:
    """Written as CSV and Parquet, and printed."""

    def where(run: Run) -> str | None:
        order = None if run.arm.kind == "free" else _order(base, run.seed)
        if run.arm.kind != "free" and order is None:
            return None
        task = _task(base, run, order)
        return task.recipe.run_dir if task.finished else None

    reader, tiou = RunReader(base, where, test), base.experiment.evaluation.headline_tiou
    tables = tuple(ablation_table(table, reader) for table in plan)
    for table in tables:
        rows, text = arrow_table(table.rows), io.BytesIO()
        csv.write_csv(rows, text)
        storage.write(f"tables/{table.letter}.csv", text.getvalue())
        storage.write_table(f"tables/{table.letter}.parquet", rows)
        print(ablation_text(table, "average mAP" if tiou == "average" else f"mAP@{tiou:g}"), flush=True)
    say(storage.uri("tables"))
    return tables
