"""One run of an ablation, in this process: the ordinary round loop, or a swapped activation."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from pbd_ray.config import Recipe, RunError, UserError, one_line
from pbd_ray.data.annotations import Split
from pbd_ray.data.quarantine import Quarantine
from pbd_ray.data.source import local_source
from pbd_ray.search.controller import compress
from pbd_ray.search.in_process import Say, in_process_steps
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.packing import Packing, model_of
from pbd_ray.search.relu_swap import Swap, is_swapped, swap_activation


@dataclass(frozen=True)
class RunTask:
    """A run as it is handed to whoever runs it."""

    name: str
    recipe: Recipe
    """`execution.run_dir` is the run's own directory."""
    swaps: str | None = None
    """Directory of the run whose last model gets this recipe's activation; None: an ordinary run."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        ledger = Ledger.refuse_other(self.recipe.run_dir, self.recipe)
        last = self.recipe.experiment.max_drops
        if self.swaps is not None:
            parent = Ledger.existing(self.swaps).round(last).read_commit()
            return parent is not None and is_swapped(ledger.storage, parent["result"])
        summary = ledger.storage.read_json("summary.json")
        return summary is not None and summary["stop_reason"] is not None


@dataclass(frozen=True, eq=False)
class Shared:
    """What all runs of an ablation have in common."""

    split: Split
    """Without the videos that are left out."""
    teacher: Mapping[str, bytes]
    """The bundle's files. Recipes of runs keep the teacher's section as it is in the ablation's recipe."""
    teacher_evaluation: Mapping[str, bytes]
    """Files of its evaluation on the test videos, by their name in a run directory; the plan comes first."""
    left_out: Quarantine


def attempt(task: RunTask, shared: Shared, say: Say) -> str | None:
    """Run to the end, or go on with what the run's directory holds.

    Returns:
        None, or why it failed: one run must not end the others, whatever it was.
    """
    try:
        _run(task, shared, say)
    except (UserError, RunError) as error:
        return one_line(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def _run(task: RunTask, shared: Shared, say: Say) -> None:
    recipe = task.recipe
    split, source = shared.split, local_source(recipe)
    # Without an owner of its own: who holds the ablation's directory holds those of its runs.
    ledger = Ledger.open(recipe.run_dir, recipe)
    ledger.record_quarantine(shared.left_out)
    if task.swaps is not None:
        swap_activation(recipe, split, source, _swap(task, shared), ledger, say)
        return
    if ledger.teacher.read_plan("evaluation") is None:
        for name, content in shared.teacher_evaluation.items():
            ledger.storage.write(name, content)
    packing = Packing(recipe.experiment.detector, split.fit.classes)
    compress(
        recipe,
        split,
        shared.teacher,
        in_process_steps(recipe, split, source, say),
        ledger,
        to_bundle=packing.files,
        from_bundle=model_of,
        cost=packing.cost,
        report=say,
    )


def _swap(task: RunTask, shared: Shared) -> Swap:
    assert task.swaps is not None
    ledger = Ledger.existing(task.swaps)
    last = ledger.committed()[-1]
    folder = ledger.round(last.round)
    bundle = folder.read_bundle()
    assert bundle is not None, "a committed round has its model"
    return Swap(
        student=model_of(bundle, ledger.storage.uri(folder.bundle)),
        teacher=model_of(shared.teacher, "teacher"),
        guide=ledger.recipe().experiment.detector,
        round=last.round,
        parent_result=last.result,
    )
