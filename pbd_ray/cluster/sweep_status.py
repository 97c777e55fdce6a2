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
from pbd_ray.compression.choice import finalists
from pbd_ray.search.state import UNDROPPED, CandidateScore, Feed, SweepTask
from pbd_ray.search.sweeping import label, stage_of


class SweepStatus:
    """Of one sweep, from its begin."""

    def __init__(self, task: SweepTask, feed: Feed, seconds: float, say: Callable[[str], None]) -> None:
        self._task, self._feed = task, feed
        self._begun = feed.seen
        self._best = ""
        # Round 0 need not be the teacher's: `jobs/evaluate.py` and `jobs/detect.py` have other detectors.
        whose = label(task.round) if task.round else task.name.rpartition("-")[0]
        self._status = Status(f"{whose}: {stage_of(task)}", seconds, say)
        ROUND.set(task.round)
        WINDOWS_PER_SECOND.clear()
        if stage_of(task) == "scores":  # what is known of the round before; a tie's sweep adds to this one's
            BEST_SCORE.clear()
            UNDROPPED_SCORE.clear()

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
        rate = f"{pace.windows_per_second:.3g} windows/s" if pace.windows_per_second else ""
        self._status(feed.seen, candidates, self._best, f"{pace.workers} workers", rate, begun=self._begun)

    def scored(self, scores: Sequence[CandidateScore]) -> None:
        """How the candidates stand, at a barrier of the race or at its end."""
        criterion = self._task.criterion
        for score in scores:
            if score.block == UNDROPPED:
                UNDROPPED_SCORE.set(score.score, criterion=criterion)
        first = max if criterion == "map" else min
        best = first(finalists(scores), key=lambda score: score.score)
        BEST_SCORE.set(best.score, criterion=criterion)
        self._best = f"block {best.block} leads with {best.score:.4f}"
