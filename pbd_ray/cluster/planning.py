"""`jobs/compress.py --plan`: measure on the cluster that the run would use, and say what it will take."""

from __future__ import annotations

from contextlib import AbstractContextManager

from pbd_ray.cluster.backend import alone_in_cluster, backend, backend_steps, fit_uncompressed, side_by_side
from pbd_ray.cluster.holder import job_finished, submission_id
from pbd_ray.cluster.inputs import given_teacher
from pbd_ray.cluster.monitoring import say
from pbd_ray.cluster.places import check_places
from pbd_ray.cluster.preflight import usable_videos
from pbd_ray.cluster.session import sigterm_as_interrupt
from pbd_ray.compression.jobs import initial_model
from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import load_split, local_source
from pbd_ray.report.forecast import Forecast, forecast_text
from pbd_ray.search.footprint import compression_footprint
from pbd_ray.search.forecasting import forecast
from pbd_ray.search.ledger import PLAN, Ledger
from pbd_ray.search.owner import Owner, owned
from pbd_ray.search.packing import Packing, model_of
from pbd_ray.search.profiling import measure
from pbd_ray.search.state import Alignment, Steps
from pbd_ray.search.stopping import most_rounds
from pbd_ray.search.storage import Storage
from pbd_ray.search.workload import uncached_share, workload

_SCRATCH = f"{PLAN}/ray"


def run_plan(recipe: Recipe) -> None:
    """Print what the run would take; keep it in its run directory, unless the run has begun.

    Raises:
        UserError: what the run itself would refuse.
    """
    storage = Ledger.refuse_other(recipe.run_dir, recipe).storage
    finished = job_finished(recipe.execution.ray_address)
    with sigterm_as_interrupt(), owned(storage, submission_id(), finished) as owner:
        plan = _plan(recipe, storage, owner)
        print(forecast_text(plan, recipe.execution), flush=True)
        if storage.exists("recipe.yaml"):
            say(f"{storage.location} holds a run that has begun: this plan is not kept")
        else:
            Ledger(storage).write_plan(plan)
            say(f"{storage.uri(PLAN)}/plan.json: the run will be compared with it")


def _plan(recipe: Recipe, storage: Storage, owner: Owner) -> Forecast:
    split = load_split(recipe, say)
    files = given_teacher(recipe, split)
    footprint = compression_footprint(recipe.experiment, split)
    with backend(recipe, recipe.execution.train_workers), alone_in_cluster(recipe, storage, owner):
        check_places(recipe, storage, footprint.total)
        split, _, _ = usable_videos(recipe, split, Ledger(storage).quarantine())
        packing = Packing(recipe.experiment.detector, split.fit.classes)
        teacher = (
            initial_model(recipe, len(split.fit.classes), say)
            if files is None
            else model_of(files, "teacher")
        )
        workers, runs_at_once = side_by_side(recipe)
        storage.remove_folder(_SCRATCH)  # of a plan that was killed: fine-tuning would go on from there
        scratch = storage.uri(_SCRATCH)

        def steps(short: Recipe, few: Split) -> AbstractContextManager[Steps]:
            return backend_steps(short, few, local_source(short), scratch)

        def fit(short: Recipe, few: Split) -> Alignment:
            return fit_uncompressed(short, few, local_source(short), scratch)

        try:
            units = measure(
                recipe,
                split,
                teacher,
                steps,
                fit if files is None else None,
                workers=workers,
                runs_at_once=runs_at_once,
                report=say,
            )
        finally:
            storage.remove_folder(_SCRATCH)
    return forecast(
        recipe,
        workload(recipe, split),
        units,
        packing.cost(teacher),
        rounds=most_rounds(recipe.experiment),
        uncached=uncached_share(recipe, split),
        disk_bytes=footprint.total,
    )
