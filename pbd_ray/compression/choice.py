"""From the scores of all candidates to the block that goes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.candidates import CandidateScore
from pbd_ray.config import ScoringConfig


@dataclass(frozen=True)
class Choice:
    """The block whose removal hurts least."""

    block: int
    tie: str | None
    """How a tie was broken, one sentence; None where there was none."""
    near: tuple[int, ...] = ()
    """Other blocks whose score is within `scoring.delta` of the chosen one's: ties for all that is known."""


def choose_block(
    scores: Sequence[CandidateScore], scoring: ScoringConfig, without: Collection[int] = ()
) -> Choice:
    """The candidate that hurts least, among those scored to the end (design, section 2, scoring criteria).

    Args:
        without: candidates that may not be chosen; one must be left.

    Ties: for map the better average mAP, then the lower train loss where it was measured (where mAP
    saturates, and where it is 0 for all candidates); then, for every criterion, the lower index.
    """
    candidates = finalists(scores, without)
    best = min(candidates, key=lambda score: _preference(score, scoring))
    first = _preference(best, scoring)[0]
    tied = [score for score in candidates if _preference(score, scoring)[0] == first]
    near = (score.block for score in candidates if abs(score.score - best.score) <= scoring.delta)
    tie = _explain(best, tied, scoring) if len(tied) > 1 else None
    return Choice(best.block, tie, tuple(sorted(set(near) - {best.block})))


def tied_on_map(scores: Sequence[CandidateScore], scoring: ScoringConfig) -> tuple[int, ...]:
    """Candidates that neither the score nor average mAP tells apart; empty where one leads.

    Only these need a train loss, and only for criterion map.
    """
    if scoring.criterion != "map":
        return ()
    candidates = finalists(scores)
    leader = min(_preference(score, scoring)[:2] for score in candidates)
    tied = tuple(score.block for score in candidates if _preference(score, scoring)[:2] == leader)
    return tied if len(tied) > 1 else ()


def finalists(scores: Sequence[CandidateScore], without: Collection[int] = ()) -> tuple[CandidateScore, ...]:
    """Candidates that can be chosen: scored to the end, not stopped by racing."""
    never = {UNDROPPED, *without}
    return tuple(score for score in scores if score.block not in never and not score.stopped)


def _preference(score: CandidateScore, scoring: ScoringConfig) -> tuple[float, float, float, int]:
    """Sorts the preferred candidate first: score, average mAP, train loss, index."""
    if scoring.criterion == "map":
        return (-score.score, -(score.average_map or 0.0), _loss(score.train_loss), score.block)
    return (_loss(score.score), 0.0, 0.0, score.block)


def _loss(value: float | None) -> float:
    """A loss that was not measured or is not a number is the worst: NaN compares with nothing."""
    return math.inf if value is None or math.isnan(value) else value


def _explain(best: CandidateScore, tied: Sequence[CandidateScore], scoring: ScoringConfig) -> str:
    blocks = ", ".join(str(score.block) for score in tied)
    ours = _preference(best, scoring)
    rivals = [_preference(score, scoring) for score in tied if score.block != best.block]
    names = ("score", "average mAP", "train loss", "lower index")
    deciding = next(i for i in range(1, 4) if all(rival[: i + 1] != ours[: i + 1] for rival in rivals))
    return f"blocks {blocks} score {best.score:.6g} alike; {names[deciding]} decided"
