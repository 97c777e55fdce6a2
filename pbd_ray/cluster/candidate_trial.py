"""One Tune trial per candidate block: how a candidate's score reaches Tune's table and loggers.

The trial computes nothing. The workers of `score_sweep` compute, the driver scores, and the trial asks
the board for news of its candidate. This module must not import torch: every trial is a process.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray import tune

STEP_SECONDS = 5.0
"""Longest wait of one trial step, so that Tune's loop never hangs on a slow sweep."""


class Board:
    """Async actor on the head: what is known of every candidate, in the order it became known."""

    def __init__(self) -> None:
        self._news: dict[int, list[dict[str, float]]] = {}
        self._changed = asyncio.Condition()

    async def publish(self, news: dict[int, dict[str, float]]) -> None:
        """Append one report for each candidate named."""
        async with self._changed:
            for candidate, report in news.items():
                self._news.setdefault(candidate, []).append(report)
            self._changed.notify_all()

    async def read(self, candidate: int, seen: int) -> dict[str, float] | None:
        """The newest report after the first `seen`, or None when nothing came in `STEP_SECONDS`."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: len(self._news.get(candidate, [])) > seen), STEP_SECONDS
                )
            except TimeoutError:
                return None
            return {"reports": len(self._news[candidate]), **self._news[candidate][-1]}


class CandidateTrial(tune.Trainable):
    """Reports `fraction` of the videos seen, and, once there is one, `score`, `average_map`, on how many
    `videos`, and whether racing `stopped` it; done when the score is final."""

    _board: Any
    _candidate: int
    _seen: int
    _latest: dict[str, float]

    def setup(self, config: dict[str, Any], board: Any = None) -> None:
        self._board = board
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        news = ray.get(self._board.read.remote(self._candidate, self._seen))
        if news is not None:
            self._seen = int(news.pop("reports"))
            self._latest = self._latest | news
        return {**self._latest, "done": bool(self._latest.get("final"))}

    def _begin(self, config: dict[str, Any]) -> None:
        self._candidate = config["block"]
        self._seen = 0
        self._latest = {"fraction": 0.0}
