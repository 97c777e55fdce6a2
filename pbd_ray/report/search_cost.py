"""What the search cost: time of every stage, resources held meanwhile, and what was to be expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pbd_ray.report.evidence import Evidence

TRAINING_FORWARDS = 3
"""A forward and a backward pass, which multiplies twice as much, in forwards."""
RUNS = ("align", "fit")
"""Stages of fine-tuning runs; the others are of the scoring pool."""


@dataclass(frozen=True)
class StageCost:
    """One stage of one round."""

    round: int
    """0: the teacher."""
    stage: str
    seconds: float
    """Wall clock, of the last start if `resumed`."""
    cpu_hours: float
    """CPUs that were held for the time, busy or not; of fine-tuning that of the epochs alone."""
    gpu_hours: float
    expected_seconds: float | None
    """By the plan made before the run began. Without one the first round's seconds times how much more was to
    be multiplied; None for the first itself."""
    resumed: bool


def search_cost_info(evidence: Evidence) -> tuple[StageCost, ...]:
    """Every measured stage, in order. Where nothing was planned the expectation counts MACs: all that a stage
    ran forwards and backwards, racing's savings included, against the same stage of the first round."""
    summary = evidence.summary
    entries = (summary["teacher"], *summary["rounds"])
    first: dict[str, tuple[float, float]] = {}
    found = []
    for number, (entry, depth) in enumerate(zip(entries, (evidence.teacher, *evidence.rounds), strict=True)):
        before = entries[_parent(entries, number)]
        for stage, facts in depth.measured.get("stages", {}).items():
            seconds = float(facts["seconds"])
            resumed = bool(facts["resumed"])
            work = _work(stage, facts, entry, before, summary["teacher"])
            expected = None
            if evidence.plan is not None:
                expected = evidence.plan.seconds_of(number, stage)
            elif stage in first and work is not None:
                base_seconds, base_work = first[stage]
                expected = base_seconds * work / base_work
            elif work and not resumed:
                first[stage] = seconds, work
            cpus, gpus = held_seconds(stage, facts)
            found.append(StageCost(number, stage, seconds, cpus / 3600, gpus / 3600, expected, resumed))
    return tuple(found)


def _parent(entries: Sequence[Mapping[str, Any]], number: int) -> int:
    """Index of the round that a round started from: the last before it that stands."""
    earlier = [index for index in range(number) if entries[index].get("standing", True)]
    return earlier[-1] if earlier else 0


def _work(
    stage: str,
    facts: Mapping[str, Any],
    entry: Mapping[str, Any],
    before: Mapping[str, Any],
    teacher: Mapping[str, Any],
) -> float | None:
    """MACs in units of nothing in particular: only ratios within one stage count."""
    if stage in RUNS:
        epochs = sum(run["epochs"] for run in facts.get("learning_rates", {}).values())
        return float(epochs * (TRAINING_FORWARDS * entry["macs"] + teacher["macs"]))
    if stage in ("evaluation", "selection"):
        return float(entry["macs"])
    if stage == "scores":
        return _scoring_work(entry, before)
    return None


def _scoring_work(entry: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """One pass of the student over all scoring videos, and of every candidate on those it was scored on
    from its fork on (docs/scoring.md)."""
    blocks, candidates = before["kept_blocks"], entry["candidates"]
    block = before["block_macs"] / len(blocks)
    rest = before["macs"] - before["block_macs"]
    most = max((facts["videos"] for facts in candidates.values()), default=0)
    if entry["criterion"] == "mse":
        return float(most * before["macs"])
    forks = sum(
        facts["videos"] * ((len(blocks) - 1 - blocks.index(int(name))) * block + rest)
        for name, facts in candidates.items()
    )
    return float(most * before["macs"] + forks)


def whole_stages(measured: Mapping[int, Mapping[str, Any]]) -> dict[tuple[int, str], float]:
    """(round, stage) -> seconds, of stages that one driver took from their begin to their end.

    Args:
        measured: measured.json by round.
    """
    return {
        (round, stage): float(facts["seconds"])
        for round, found in measured.items()
        for stage, facts in found.get("stages", {}).items()
        if not facts["resumed"]
    }


def held_seconds(stage: str, facts: Mapping[str, Any]) -> tuple[float, float]:
    """(CPU, GPU) seconds that a stage of measured.json held, busy or not."""
    if stage in RUNS:
        runs = facts.get("learning_rates", {}).values()
        held = sum(run["seconds"] for run in runs) * facts["train_workers"]
    else:
        held = facts["seconds"] * facts.get("workers", 1)
    return held * facts["cpus_per_worker"], held * facts["gpus_per_worker"]
