"""summary.json: the run in one file for people and scripts. Made from the records, never read back."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from pbd_ray.search.records import interval_to_json, map_to_json
from pbd_ray.search.standing import doubt, rolled_back
from pbd_ray.search.state import UNDROPPED, RoundRecord, Summary
from pbd_ray.search.stopping import LATENCY


def summary_to_json(summary: Summary) -> dict[str, Any]:
    """`teacher`, `rounds` (one entry a committed round), `drops` (blocks that went in rounds that stand, in
    order), `stop_reason` (None until the end), `bit_exact`, `quarantined` (video -> why it is left out)."""
    rounds = [_round(record) for record in summary.rounds]
    return {
        "teacher": _evaluated(summary.teacher),
        "rounds": rounds,
        "drops": [entry["dropped_block"] for entry in rounds if entry["standing"]],
        "stop_reason": summary.stop_reason,
        "bit_exact": summary.bit_exact,
        "quarantined": dict(summary.quarantined),
    }


def _round(record: RoundRecord) -> dict[str, Any]:
    decision = record.decision
    assert decision is not None, "a round has a decision"
    scores = {score.block: score.score for score in decision.scores}
    reason = rolled_back(record.evaluation)
    return {
        "round": record.round,
        "standing": reason is None,
        "rolled_back": reason,
        "undecided": doubt(record.evaluation) is not None,
        "dropped_block": decision.dropped_block,
        "criterion": decision.criterion,
        "scores": {str(block): _finite(scores[block]) for block in sorted(scores) if block != UNDROPPED},
        "undropped_score": _finite(scores[UNDROPPED]) if UNDROPPED in scores else None,
        "candidates": {
            str(score.block): {
                "score": _finite(score.score),
                "average_map": score.average_map,
                "train_loss": None if score.train_loss is None else _finite(score.train_loss),
                "videos": score.videos,
                "stopped": score.stopped,
                "behind": score.behind,
                "behind_low": score.behind_low,
                "behind_high": score.behind_high,
            }
            for score in sorted(decision.scores, key=lambda score: score.block)
            if score.block != UNDROPPED
        },
        "tie": decision.tie,
        "near": list(decision.near),
        "lr": record.learning_rate,
        "epoch": record.epoch,
        **_evaluated(record),
        "interval": interval_to_json(record.evaluation.interval),
        "selection_interval": interval_to_json(record.evaluation.selection_interval),
        "guards": [asdict(guard) for guard in record.evaluation.guards],
    }


def _evaluated(record: RoundRecord) -> dict[str, Any]:
    evaluation, measured = record.evaluation, record.measured
    return {
        "kept_blocks": list(evaluation.kept_blocks),
        "map": map_to_json(evaluation.map),
        "average_map": evaluation.average_map,
        "headline_map": evaluation.headline_map,
        "macs": evaluation.macs,
        "block_macs": evaluation.block_macs,
        "params": evaluation.params,
        "latency_ms": measured["latency"][LATENCY],
        "seconds": {stage: facts["seconds"] for stage, facts in measured.get("stages", {}).items()},
        "result": record.result,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN or infinity: a candidate whose loss diverged has no score to show."""
    return value if math.isfinite(value) else None
