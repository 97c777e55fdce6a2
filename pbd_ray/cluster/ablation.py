"""The paper's supplementary experiments from a recipe to their tables: what `jobs/ablate.py` calls.

The output directory is a run directory without rounds of its own:

    recipe.yaml, quarantine.json, owners/   as of any run (search/ledger.py)
    teacher/           the bundle that all runs start from, and its evaluation
    arms/NAME-seedK/   a run directory each
    tables/            one CSV and one Parquet file a table
    ablation.html      the same as a page (report/ablation_page.py)
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from pyarrow import csv

from pbd_ray.cluster.ablation_inputs import shared_inputs
from pbd_ray.cluster.ablation_sweep import Outcomes, run_here, run_on_ray
from pbd_ray.cluster.backend import alone_in_cluster, backend
from pbd_ray.cluster.holder import job_finished, submission_id
from pbd_ray.cluster.inputs import given_teacher
from pbd_ray.cluster.monitoring import say
from pbd_ray.cluster.places import check_places
from pbd_ray.cluster.preflight import usable_videos
from pbd_ray.cluster.session import sigterm_as_interrupt
from pbd_ray.config import Recipe, RunError
from pbd_ray.data.annotations import Annotations, Split
from pbd_ray.data.source import load_split
from pbd_ray.report.ablation import AblationTable, ablation_text, arrow_table
from pbd_ray.report.ablation_page import PAGE, ablation_page
from pbd_ray.report.rounds import headline_name
from pbd_ray.search.ablation import OURS, Run, run_recipe
from pbd_ray.search.ablation_results import RunReader, ablation_table
from pbd_ray.search.ablation_run import RunTask
from pbd_ray.search.ablation_tables import TablePlan, runs_of
from pbd_ray.search.footprint import compression_footprint, teacher_footprint
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.owner import Owner, owned
from pbd_ray.search.storage import Storage


def run_ablation(base: Recipe, plan: Sequence[TablePlan]) -> tuple[AblationTable, ...]:
    """Run what is missing of the tables; write and print them.

    Args:
        base: from `search.ablation.ablation_recipe`; its run_dir is the output directory.

    Raises:
        UserError: what the user can mend.
        RunError: runs failed; the others are done, and the tables are made of them.
    """
    storage = Ledger.refuse_other(base.run_dir, base).storage
    for run in runs_of(plan):
        _task(base, run)  # refuses what is there of another ablation, before anything is started
    finished = job_finished(base.execution.ray_address)
    with sigterm_as_interrupt(), owned(storage, submission_id(), finished) as owner:
        outcomes, test = _run_all(base, plan, storage, owner)
        failed = {name: reason for name, reason in outcomes.items() if reason is not None}
        tables = _tables(base, plan, storage, test, failed)
    if failed:
        told = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise RunError(f"{len(failed)} runs failed ({told}); the same command goes on from here")
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
        shared = shared_inputs(base, split, source, left_out, ledger, teacher)
        outcomes: dict[str, str | None] = {}
        for sweep, kinds in (("free", ("free",)), ("following", ("ordered", "swapped"))):
            tasks = {run: _task(base, run) for run in runs_of(plan) if run.arm.kind in kinds}
            outcomes |= {
                run.name: f"needs {Run(OURS, run.seed).name}" for run, task in tasks.items() if task is None
            }
            left = [task for task in tasks.values() if task is not None and not task.finished]
            say(f"ablation, {sweep} runs: {len(left)} of {len(tasks)} to do")
            if left and base.execution.backend == "local":
                outcomes |= run_here(left, shared, base.execution)
            elif left:
                scratch = ledger.scratch_uri()
                outcomes |= run_on_ray(left, shared, f"ablation-{sweep}", scratch, base.execution)
            ledger.discard_scratch()
    return outcomes, split.test


def _place(base: Recipe, run: Run) -> str:
    return Storage.at(base.run_dir).uri(f"arms/{run.name}")


def _task(base: Recipe, run: Run) -> RunTask | None:
    """None where it follows our method, and that has not come to its end.

    Raises:
        LedgerError: the run's directory holds another experiment.
    """
    ours, order, swaps = Run(OURS, run.seed), None, None
    if run.arm.kind != "free":
        first = _task(base, ours)
        if first is None or not first.finished:
            return None
        records = Ledger.existing(_place(base, ours)).committed()
        order = [record.decision.dropped_block for record in records if record.decision is not None]
    if run.arm.kind == "swapped":
        swaps = _place(base, ours)
    task = RunTask(run.name, run_recipe(base, run, _place(base, run), order), swaps)
    Ledger.refuse_other(task.recipe.run_dir, task.recipe)
    return task


def _bytes(base: Recipe, plan: Sequence[TablePlan], split: Split) -> int:
    """What all runs write at most; which blocks they drop makes no difference. Only the teacher's fit leaves
    checkpoints: runs keep theirs in memory."""
    blocks = range(base.experiment.max_drops)
    recipes = [run_recipe(base, run, _place(base, run), blocks) for run in runs_of(plan)]
    runs = [compression_footprint(recipe.experiment, split) for recipe in recipes]
    fits = base.experiment.teacher.source == "train"
    teacher = teacher_footprint(base.experiment, len(split.fit.classes)).total if fits else 0
    return teacher + sum(run.bundles + run.tables for run in runs)


def _tables(
    base: Recipe, plan: Sequence[TablePlan], storage: Storage, test: Annotations, failed: Mapping[str, str]
) -> tuple[AblationTable, ...]:
    """Written as CSV, Parquet and a page, and printed."""

    def where(run: Run) -> str | None:
        task = _task(base, run)
        return task.recipe.run_dir if task is not None and task.finished else None

    reader, headline = RunReader(base, where, test), headline_name(base.experiment.evaluation.headline_tiou)
    tables = tuple(ablation_table(table, reader) for table in plan)
    for table in tables:
        rows, text = arrow_table(table.rows), io.BytesIO()
        csv.write_csv(rows, text)
        storage.write(f"tables/{table.letter}.csv", text.getvalue())
        storage.write_table(f"tables/{table.letter}.parquet", rows)
        print(ablation_text(table, headline), flush=True)
    page = ablation_page(tables, base.experiment.name, headline, base.to_yaml(), failed)
    storage.write(PAGE, page.encode())
    for name in ("tables", PAGE):
        say(storage.uri(name))
    return tables
