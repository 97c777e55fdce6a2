"""What a person is told of a sweep while it goes: the status line and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pbd_ray.cluster.metrics_export import (
    BEST_SCORE,
    CANDIDATES_ALIVE,
    ROUND,
    SLICES,
    SLICES_DONE,
    UNDROPPED_SCORE,
    WINDOWS_PER_SECOND,
)
from pbd_ray.cluster.monitoring import Status
from pbd_ray.cluster.pool import Pace
from pbd_ray.search.state import UNDROPPED, CandidateScore, Feed, SweepTask
from pbd_ray.search.sweeping import label, stage_of


class SweepStatus:
    """Of one sweep, from its begin."""

    def __init__(self, task: SweepTask, feed: Feed, seconds: float, say: Callable[[str], None]) -> None:
        self._task, self._feed = task, feed
        self._begun = feed.seen
        self._best = ""
        self._status = Status(f"{label(task.round)}: {stage_of(task)}", seconds, say)
        ROUND.set(task.round)
        WINDOWS_PER_SECOND.clear()

    def tell(self, pace: Pace) -> None:
        """How far it is."""
        feed = self._feed
        SLICES.set(feed.planned)
        SLICES_DONE.set(feed.planned - feed.remaining)
        WINDOWS_PER_SECOND.set(pace.windows_per_second, stage=stage_of(self._task))
        candidates = ""
        if self._task.candidates:
            CANDIDATES_ALIVE.set(len(feed.alive))
            candidates = f"{len(feed.alive)} of {len(self._task.candidates)} candidates"
        rate = f"{pace.windows_per_second:.3g} windows/s"
        self._status(feed.seen, candidates, self._best, f"{pace.workers} workers", rate, begun=self._begun)

    def scored(self, scores: Sequence[CandidateScore]) -> None:
        """How the candidates stand, at a barrier of the race or at its end."""
        criterion = self._task.criterion
        known = {score.block: score.score for score in scores}
        if UNDROPPED in known:
            UNDROPPED_SCORE.set(known.pop(UNDROPPED), criterion=criterion)
        best = max if criterion == "map" else min
        block = best(known, key=lambda block: known[block])
        BEST_SCORE.set(known[block], criterion=criterion)
        self._best = f"block {block} leads with {known[block]:.4f}"
