"""When a run stops dropping (design, section 2, Stop). The first rule met ends it."""

from __future__ import annotations

from dataclasses import dataclass

from pbd_ray.config import StoppingConfig
from pbd_ray.search.state import Interval

LATENCY = "p50_ms"
"""Which of a latency measurement's numbers the rule and the summary read."""


@dataclass(frozen=True)
class Standing:
    """What the rules look at after a committed round; after none, the teacher's own standing."""

    drops: int
    kept: int
    macs_ratio: float = 1.0
    """Student over teacher."""
    latency_ratio: float = 1.0
    """Measured once a round and read from its record."""
    recovery: Interval | None = None
    """The student against the teacher on selection videos, with margin `tolerance`; None: no round yet."""


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
    recovery = standing.recovery
    if stopping.tolerance is not None and recovery is not None and recovery.verdict != "holds":
        return (
            f"selection mAP may be {-recovery.low:.4f} below the teacher's (difference "
            f"{recovery.difference:+.4f}), tolerance {stopping.tolerance}: the student no longer recovers"
        )
    return None
