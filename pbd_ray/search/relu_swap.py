"""Another activation in a finished model, aligned again (paper, supplement, Table C).

A run directory of its own: recipe.yaml with the other activation; rounds/NN as a round has it, NN being the
round that the model comes from, without a decision; sparsity.json last: it means that all is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pbd_ray.compression.blocks import Model, to_detector
from pbd_ray.compression.jobs import alignment_job
from pbd_ray.compression.sparsity import Sparsity, measure_sparsity
from pbd_ray.config import DetectorConfig, Recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import VideoSource, inference_batches
from pbd_ray.search.evaluation import evaluate
from pbd_ray.search.in_process import Say, fit_grid, in_process_steps
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.packing import Packing, model_of
from pbd_ray.search.rate_search import grid_of
from pbd_ray.search.state import SweepTask
from pbd_ray.search.storage import LedgerError, Storage
from pbd_ray.search.sweeping import Sweeper

SPARSITY = "sparsity.json"


@dataclass(frozen=True, eq=False)
class Swap:
    """What is swapped, and what guides the alignment."""

    student: Model
    teacher: Model
    guide: DetectorConfig
    """Architecture of the teacher, and of the student before the swap."""
    round: int
    """That the student comes from."""
    parent_result: str


def swap_activation(
    recipe: Recipe, split: Split, source: VideoSource, swap: Swap, ledger: Ledger, say: Say
) -> None:
    """Align the student with the recipe's activation, evaluate it, count its zeros; or go on with that.

    Args:
        recipe: its `detector` has the other activation.
        ledger: of the run's own directory.
    """
    experiment, folder = recipe.experiment, ledger.round(swap.round)
    packing = Packing(experiment.detector, split.fit.classes)
    if folder.read_alignment() is None:
        job = alignment_job(recipe, split, source, swap.round, swap.student, swap.teacher)
        device = torch.device(recipe.execution.device)
        found = fit_grid(replace(job, guide=swap.guide), grid_of(job.config, None), say, device)
        facts = {"experiment": experiment.name, "round": swap.round, "parent_result": swap.parent_result}
        folder.write_alignment(
            packing.files(found.model, facts), found.learning_rate, found.epoch, found.curves
        )
    bundle = folder.read_bundle()
    assert bundle is not None, "the bundle is written before alignment.parquet"
    made_from = json.loads(bundle["config.json"])["facts"]["parent_result"]
    _require_parent(ledger.storage, made_from, swap.parent_result)
    aligned = model_of(bundle, ledger.storage.uri(folder.bundle))
    if folder.read_evaluation() is None:
        sweeper = Sweeper(recipe, in_process_steps(recipe, split, source, say).sweep, say)
        task = SweepTask("swapped-evaluation", swap.round, aligned, (), "map", "test")
        rows = sweeper.rows(folder, "evaluation", task, split.test).table
        rules, cost = experiment.evaluation, packing.cost(aligned)
        folder.write_evaluation(evaluate(split.test, rows, None, rules, experiment.seed, aligned, cost))
    if not ledger.storage.exists(SPARSITY):
        of = {
            "guide": (swap.student, swap.guide),
            "swapped": (swap.student, experiment.detector),
            "aligned": (aligned, experiment.detector),
        }
        counted = {
            name: asdict(_count(recipe, split, source, model, config)) for name, (model, config) in of.items()
        }
        ledger.storage.write_json(SPARSITY, {"parent_result": swap.parent_result, **counted})
        shares = ", ".join(f"{name} {count['zeros']:.3f}" for name, count in counted.items())
        say(f"zeros of the hidden activations: {shares}")


def is_swapped(storage: Storage, parent_result: str) -> bool:
    """Whether all is done, with the model of that result.

    Raises:
        LedgerError: it was done with another model.
    """
    done = storage.read_json(SPARSITY)
    if done is not None:
        _require_parent(storage, done["parent_result"], parent_result)
    return done is not None


def _require_parent(storage: Storage, made_from: str, now: str) -> None:
    if made_from != now:
        raise LedgerError(f"{storage.location} is made from another model than there is now: remove it")


def read_sparsity(storage: Storage) -> Mapping[str, Mapping[str, Any]]:
    """`guide` (the student before the swap), `swapped` (right after it) and `aligned`: `Sparsity` as JSON."""
    counted: dict[str, Any] = storage.read_json(SPARSITY)
    return {name: counted[name] for name in ("guide", "swapped", "aligned")}


def _count(
    recipe: Recipe, split: Split, source: VideoSource, model: Model, config: DetectorConfig
) -> Sparsity:
    """On the windows of the test videos."""
    batches = (
        batch
        for video in split.test.videos
        for batch in inference_batches(source, video, config.grid, recipe.execution.window_batch)
    )
    detector = to_detector(model, config, len(split.fit.classes))
    return measure_sparsity(
        detector, batches, recipe.experiment.autocast, torch.device(recipe.execution.device)
    )
