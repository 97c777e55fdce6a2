"""The round loop: score, drop, align, commit, until a stopping rule is met (paper, section 3).

Starting, resuming and finishing a run are the same walk: every stage does only what the ledger lacks. The
expensive work comes in as plain callables (`Steps`), so the loop is the same in one process and on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pbd_ray.compression.choice import finalists
from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.quarantine import NOTHING
from pbd_ray.report.forecast import Forecast
from pbd_ray.search.annotated import record_split, split_hash
from pbd_ray.search.budget import budget_reason
from pbd_ray.search.environment import current_environment
from pbd_ray.search.hashing import weights_hash
from pbd_ray.search.ledger import Ledger, LedgerError, quarantine_hash
from pbd_ray.search.stages import FromBundle, Stages, ToBundle
from pbd_ray.search.standing import doubt, rolled_back, standing, tried
from pbd_ray.search.state import (
    TEACHER_ROUND,
    AlignTask,
    Cost,
    Model,
    RoundRecord,
    Steps,
    Summary,
    without_block,
)
from pbd_ray.search.stopping import LATENCY, Standing, stop_reason
from pbd_ray.search.summary import summary_to_json
from pbd_ray.search.sweeping import Report, label


def compress(
    recipe: Recipe,
    split: Split,
    teacher: Mapping[str, bytes] | None,
    steps: Steps,
    ledger: Ledger,
    *,
    to_bundle: ToBundle,
    from_bundle: FromBundle,
    cost: Callable[[Model], Cost],
    report: Report,
    publish: Callable[[], None] = lambda: None,
) -> Summary:
    """Run, or go on with, the compression that the ledger holds, to its end.

    summary.json is written anew after every commit and at the end.

    Args:
        split: fit videos score and train, selection videos judge recovery, test videos are read once a
            committed round and choose nothing.
        teacher: files of the uncompressed detector's bundle; None: those in the ledger.
        cost: computed cost of one window.
        publish: called whenever summary.json is new, to show the run as it stands.

    Raises:
        LedgerError: the ledger holds a run on other data or from another teacher.
        ValueError: a subset that the recipe needs has no videos.
    """
    _require_videos(recipe, split)
    stages = Stages(recipe, split, steps, ledger, to_bundle, from_bundle, cost, report)
    records, plan = list(ledger.committed()), ledger.plan(recipe)
    over = bool(records) and _stop_reason(recipe, records, plan) is not None
    original = _open_teacher(stages, teacher, over)
    for record in records:
        report(f"{label(record.round)}: on record, result {record.result[:12]}")
    if not records:
        records.append(_commit(stages, TEACHER_ROUND, original))
    while (reason := _stop_reason(recipe, records, plan)) is None:
        _write_summary(ledger, records, None)
        publish()
        records.append(_round(stages, original, records))
    report(f"stop: {reason}")
    summary = _write_summary(ledger, records, reason)
    publish()
    return summary


def _round(stages: Stages, teacher: Model, records: Sequence[RoundRecord]) -> RoundRecord:
    """Take a block from the last model that stands, and commit what comes of it, whether it stands or not."""
    before, parent = records[-1], standing(records)[-1]
    ledger, number = stages.ledger, before.round + 1
    folder = ledger.round(number)
    if not folder.begun():
        ledger.discard_scratch()  # of a round whose driver died right after the commit
    model = stages.model(ledger.round(parent.round))
    decision = stages.decide(folder, model, teacher, tried(records))
    student = without_block(model, decision.dropped_block)
    task = AlignTask(number, student, teacher, before.result, parent.learning_rate)
    aligned = stages.align(folder, decision, task)
    return _commit(stages, number, aligned)


def _commit(stages: Stages, number: int, model: Model) -> RoundRecord:
    """Evaluate, measure, and close the round (for the teacher, round 0, that is all there is)."""
    folder = stages.ledger.round(number)
    evaluation = stages.evaluate(folder, model)
    stages.measure_latency(folder, model)
    record = stages.ledger.commit(number, weights_hash(model.weights))
    stages.ledger.discard_scratch()
    stages.report(
        f"{label(number)}: committed, mAP {evaluation.headline_map:.4f}, {evaluation.macs / 1e9:.4g} G MACs, "
        f"result {record.result[:12]}"
    )
    if reason := rolled_back(evaluation):
        stages.report(f"{label(number)}: rolled back, {reason}")
    elif reason := doubt(evaluation):
        stages.report(f"{label(number)}: stands, {reason}")
    return record


def _open_teacher(stages: Stages, files: Mapping[str, bytes] | None, over: bool) -> Model:
    """The teacher in the ledger, put there if this is the first start; and the environment on record.

    Args:
        over: the run has come to its end.
    """
    ledger, folder = stages.ledger, stages.ledger.teacher
    if folder.read_bundle() is None:
        assert files is not None, "a new run needs its teacher"
        folder.write_bundle(files)
    teacher = stages.model(folder)
    teacher_hash = weights_hash(teacher.weights)
    if files is not None and weights_hash(stages.from_bundle(files, "teacher").weights) != teacher_hash:
        raise LedgerError(f"{ledger.storage.uri('teacher')} holds another teacher than the one given")
    left_out = quarantine_hash(ledger.quarantine())
    data_hash = split_hash(stages.split)
    environment = current_environment(stages.recipe.execution, data_hash, teacher_hash, left_out)
    for change in ledger.record_environment(environment, computes=not over):
        stages.report(f"not bit-exact with the first start: {change}")
    record_split(ledger.storage, stages.split)
    return teacher


def _stop_reason(recipe: Recipe, records: Sequence[RoundRecord], plan: Forecast | None) -> str | None:
    stood, given_up = standing(records), tried(records)
    teacher, last = stood[0], stood[-1]
    blocks = tuple(decision.dropped_block for decision in given_up)
    status = Standing(
        drops=len(stood) - 1,
        kept=len(last.evaluation.kept_blocks),
        macs_ratio=last.evaluation.macs / teacher.evaluation.macs,
        latency_ratio=last.measured["latency"][LATENCY] / teacher.measured["latency"][LATENCY],
        rolled_back=blocks,
        untried=len(finalists(given_up[-1].scores, blocks)) if given_up else 0,
    )
    done = stop_reason(status, recipe.experiment.stopping, recipe.experiment.max_drops)
    return done or budget_reason(records, recipe.execution, plan)


def _write_summary(ledger: Ledger, records: list[RoundRecord], reason: str | None) -> Summary:
    environment = ledger.environment()
    assert environment is not None, "the environment is on record before the first commit"
    quarantine = ledger.quarantine() or NOTHING
    bit_exact = not environment["changes"]
    summary = Summary(records[0], tuple(records[1:]), reason, bit_exact, quarantine.reasons)
    ledger.write_summary(summary_to_json(summary))
    return summary


def _require_videos(recipe: Recipe, split: Split) -> None:
    needed = {"fit": split.fit, "test": split.test}
    if recipe.experiment.stopping.judges:
        needed["selection"] = split.selection
    for subset, part in needed.items():
        if not part.videos:
            raise ValueError(f"experiment.data: the {subset} subset has no videos")
