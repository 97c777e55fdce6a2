"""What the ledger's files say: plain JSON values and Arrow tables, and the way back.

Everything here is computed and enters a round's `result` hash, so no field holds a time, a host or a path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pbd_ray.search.state import CandidateScore, Decision, Evaluation, Guard, Interval, Slice, SweepTask

SCORE_SCHEMA = pa.schema(
    [
        pa.field("block", pa.int32(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("average_map", pa.float64()),
        pa.field("train_loss", pa.float64()),
        pa.field("videos", pa.int32(), nullable=False),
        pa.field("stopped", pa.bool_(), nullable=False),
        pa.field("behind", pa.float64()),
        pa.field("behind_low", pa.float64()),
        pa.field("behind_high", pa.float64()),
    ]
)
"""One row a candidate; block -1 is the undropped student."""


def scores_to_table(scores: Sequence[CandidateScore]) -> pa.Table:
    """SCORE_SCHEMA rows in the order given."""
    return pa.Table.from_pylist([asdict(score) for score in scores], schema=SCORE_SCHEMA)


def scores_from_table(table: pa.Table) -> tuple[CandidateScore, ...]:
    """The inverse of `scores_to_table`."""
    return tuple(CandidateScore(**row) for row in table.to_pylist())


def plan_to_json(task: SweepTask, slices: Sequence[Slice]) -> dict[str, Any]:
    """A slice plan and what it is a plan of."""
    return {
        "criterion": task.criterion,
        "subset": task.subset,
        "kept_blocks": list(task.model.kept_blocks),
        "candidates": list(task.candidates),
        "slices": [asdict(piece) | {"videos": list(piece.videos)} for piece in slices],
    }


def slices_from_json(value: Mapping[str, Any]) -> tuple[Slice, ...]:
    return tuple(Slice(piece["index"], tuple(piece["videos"]), piece["stage"]) for piece in value["slices"])


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """All of a decision but the scores, which are a table of their own."""
    return {
        "round": decision.round,
        "criterion": decision.criterion,
        "dropped_block": decision.dropped_block,
        "kept_blocks": list(decision.kept_blocks),
        "tie": decision.tie,
        "near": list(decision.near),
    }


def decision_from_json(value: Mapping[str, Any], scores: tuple[CandidateScore, ...]) -> Decision:
    return Decision(
        round=value["round"],
        criterion=value["criterion"],
        dropped_block=value["dropped_block"],
        kept_blocks=tuple(value["kept_blocks"]),
        scores=scores,
        tie=value["tie"],
        near=tuple(value["near"]),
    )


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    kept = list(evaluation.kept_blocks)
    return asdict(evaluation) | {"map": map_to_json(evaluation.map), "kept_blocks": kept}


def evaluation_from_json(value: Mapping[str, Any]) -> Evaluation:
    keys = ("interval", "selection_interval")
    intervals = {key: None if value[key] is None else Interval(**value[key]) for key in keys}
    by_tiou = {float(tiou): score for tiou, score in value["map"].items()}
    kept, guards = tuple(value["kept_blocks"]), tuple(Guard(**guard) for guard in value["guards"])
    computed = {"map": by_tiou, "kept_blocks": kept, "guards": guards}
    return Evaluation(**(dict(value) | intervals | computed))


def map_to_json(by_tiou: Mapping[float, float]) -> dict[str, float]:
    """mAP by tIoU, the keys as decimal text in ascending order."""
    return {repr(float(tiou)): float(by_tiou[tiou]) for tiou in sorted(by_tiou)}


def interval_to_json(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else asdict(interval)
