"""Which committed rounds stand, and which were rolled back. Pure.

Nothing of it is stored: it follows from what a round's evaluation.json says of the selection videos, so a
resumed run decides as the first did. The next round takes a block from the last model that stands.
"""

from __future__ import annotations

from collections.abc import Sequence

from pbd_ray.metrics.guards import GUARDED
from pbd_ray.search.state import Decision, Evaluation, Guard, RoundRecord, Verdict

_SHOWN = 3
"""Pieces of evidence that a sentence names."""


def rolled_back(evaluation: Evaluation) -> str | None:
    """Why a round does not stand, one sentence; None where it does: nothing there is `inferior`."""
    return _evidence(evaluation, "inferior")


def doubt(evaluation: Evaluation) -> str | None:
    """What the selection videos leave open of a round that stands, one sentence; None where all holds."""
    return None if rolled_back(evaluation) else _evidence(evaluation, "undecided")


def standing(records: Sequence[RoundRecord]) -> tuple[RoundRecord, ...]:
    """The teacher and the rounds that stand, of all that are committed: the last one's model is the run's."""
    return tuple(record for record in records if rolled_back(record.evaluation) is None)


def tried(records: Sequence[RoundRecord]) -> tuple[Decision, ...]:
    """What was decided and rolled back since the last round that stands, in order: each took another block
    from the same model, by the same scores."""
    last = standing(records)[-1].round
    since = (record.decision for record in records if record.round > last)
    return tuple(decision for decision in since if decision is not None)


def _evidence(evaluation: Evaluation, verdict: Verdict) -> str | None:
    found = []
    interval = evaluation.selection_interval
    if interval is not None and interval.verdict == verdict:
        few = f", only {interval.videos} videos" if interval.unreliable else ""
        bounds = _bounds(interval.difference, interval.low, interval.high)
        found.append(f"mAP less the teacher's {bounds}, tolerance {interval.margin:g}{few}")
    found += [_guard(guard) for guard in evaluation.guards if guard.verdict == verdict]
    if not found:
        return None
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{verdict} on selection videos: {'; '.join(found[:_SHOWN])}{more}"


def _guard(guard: Guard) -> str:
    few = f", only {guard.videos} videos" if guard.unreliable else ""
    bounds = _bounds(guard.difference, guard.low, guard.high)
    return f"{GUARDED[guard.what]} {guard.name} {bounds}, limit {guard.limit:g}{few}"


def _bounds(difference: float, low: float, high: float) -> str:
    return f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]"
