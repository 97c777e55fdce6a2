"""From a run directory to what its report is made from. Nothing else is read: neither videos nor models."""

from __future__ import annotations

from pbd_ray.data.annotations import Annotations
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.report.evidence import DepthEvidence, Evidence
from pbd_ray.search.annotated import recorded_split
from pbd_ray.search.evaluation import detections_of
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.state import RoundRecord
from pbd_ray.search.storage import LedgerError


def gather(ledger: Ledger) -> Evidence:
    """The evidence of a run so far.

    Raises:
        LedgerError: no round is committed yet, or what is there is not what was committed.
    """
    records, summary = ledger.committed(), ledger.storage.read_json("summary.json")
    environment = ledger.environment()
    if not records or summary is None or environment is None:
        raise LedgerError(f"{ledger.storage.location}: not even the teacher is committed yet")
    split, recipe = recorded_split(ledger), ledger.recipe()
    depths = [_depth(ledger, record, split.test) for record in records[: 1 + len(summary["rounds"])]]
    return Evidence(
        location=ledger.storage.location,
        recipe=recipe,
        summary=summary,
        environment=environment,
        test=scored_against(split.test),
        plan=ledger.plan(recipe),
        counts={name: len(part.videos) for name, part in split.parts.items()},
        teacher=depths[0],
        rounds=tuple(depths[1:]),
    )


def _depth(ledger: Ledger, record: RoundRecord, test: Annotations) -> DepthEvidence:
    rows = ledger.round(record.round).read_slices("evaluation")
    curves = record.curves if record.curves is not None and record.curves.num_rows else None
    return DepthEvidence(named(test, detections_of(rows)), curves, record.measured)
