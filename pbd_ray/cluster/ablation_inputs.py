"""What all runs of an ablation share: the videos, the teacher, and what it detects."""

from __future__ import annotations

from collections.abc import Mapping

from pbd_ray.cluster.backend import backend_steps, fit_uncompressed
from pbd_ray.cluster.monitoring import say
from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.quarantine import Quarantine
from pbd_ray.data.source import VideoSource
from pbd_ray.search.ablation_run import Shared
from pbd_ray.search.hashing import weights_hash
from pbd_ray.search.ledger import Ledger, LedgerError
from pbd_ray.search.packing import Packing, model_of
from pbd_ray.search.state import TEACHER_ROUND, SweepTask
from pbd_ray.search.sweeping import Sweeper


def shared_inputs(
    base: Recipe,
    split: Split,
    source: VideoSource,
    left_out: Quarantine,
    ledger: Ledger,
    given: Mapping[str, bytes] | None,
) -> Shared:
    """Read what the ablation's directory holds of it; find, and write there, what is missing.

    Args:
        split: without the videos that are left out.
        given: files of the teacher that the recipe names; None: it is to be fitted.

    Raises:
        LedgerError: another teacher is given than is on record.
    """
    teacher = _teacher(base, split, source, ledger, given)
    evaluation = _evaluation(base, split, source, ledger, teacher)
    return Shared(split, teacher, evaluation, left_out)


def _teacher(
    base: Recipe, split: Split, source: VideoSource, ledger: Ledger, given: Mapping[str, bytes] | None
) -> Mapping[str, bytes]:
    """The bundle that all runs start from: the one on record, else the one given, else one fitted now."""
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


def _evaluation(
    base: Recipe, split: Split, source: VideoSource, ledger: Ledger, teacher: Mapping[str, bytes]
) -> Mapping[str, bytes]:
    """The teacher's detections on the test videos: once for all runs. The plan first, for slices without one
    would count for another plan."""
    model = model_of(teacher, "teacher")
    task = SweepTask("teacher-evaluation", TEACHER_ROUND, model, (), "map", "test")
    with backend_steps(base, split, source, ledger.scratch_uri()) as steps:
        Sweeper(base, steps.sweep, say).rows(ledger.teacher, "evaluation", task, split.test)
    folder, storage = f"{ledger.teacher.name}/evaluation", ledger.storage
    names = sorted(storage.names(folder), key=lambda name: (not name.endswith("plan.json"), name))
    return {name: storage.read(name) for name in names}
