"""When a run stops dropping (design, section 2, Stop). The first rule met ends it.

The rules look at the last model that stands; `search/standing.py` says which rounds do.
"""

from __future__ import annotations

from dataclasses import dataclass

from pbd_ray.config import Experiment, StoppingConfig

LATENCY = "p50_ms"
"""Which of a latency measurement's numbers the rule and the summary read."""


@dataclass(frozen=True)
class Standing:
    """What the rules look at after a committed round: the last model that stands, first the teacher."""

    drops: int
    """Rounds that stand."""
    kept: int
    macs_ratio: float = 1.0
    """Student over teacher."""
    latency_ratio: float = 1.0
    """Measured once a round and read from its record."""
    rolled_back: tuple[int, ...] = ()
    """Blocks that were taken from that model and put back, in order."""
    untried: int = 0
    """Other candidates that the same scores could take instead."""


def stop_reason(standing: Standing, stopping: StoppingConfig, max_drops: int) -> str | None:
    """One sentence on why no further block is dropped, or None to go on.

    Args:
        max_drops: `Experiment.max_drops`, by default a quarter of the teacher's depth (paper, section 4.1).
    """
    if standing.drops >= max_drops:
        return f"dropped {standing.drops} of at most {max_drops} blocks"
    if standing.kept <= 1:
        return "one block is left"
    target = stopping.target_macs_ratio
    if target is not None and standing.macs_ratio <= target:
        return f"MACs are {standing.macs_ratio:.4f} of the teacher's, target {target}"
    target = stopping.target_latency_ratio
    if target is not None and standing.latency_ratio <= target:
        return f"latency is {standing.latency_ratio:.4f} of the teacher's, target {target}"
    if len(standing.rolled_back) > stopping.runner_ups:
        return f"{_given_up(standing.rolled_back)} (stopping.runner_ups {stopping.runner_ups})"
    if standing.rolled_back and not standing.untried:
        return f"{_given_up(standing.rolled_back)} (no other candidate is left)"
    return None


def most_rounds(experiment: Experiment) -> int:
    """Rounds that a run can come to, those included that are rolled back."""
    stopping, depth = experiment.stopping, experiment.detector.backbone.depth
    if not stopping.judges or experiment.scoring.drops is not None:
        return experiment.max_drops
    return sum(min(1 + stopping.runner_ups, depth - dropped) for dropped in range(experiment.max_drops))


def _given_up(blocks: tuple[int, ...]) -> str:
    first, *others = blocks
    each = "each " if others else ""
    named = ", then ".join([f"block {first}", *map(str, others)])
    return f"removal of {named}, {each}inferior on selection videos: the student no longer recovers"
