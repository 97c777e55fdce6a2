"""What a person is told of a grid of learning rates while it trains: lines and metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ray import tune

from pbd_ray.cluster.metrics_export import (
    DECODE_WAIT,
    EPOCHS_DONE,
    LOSS,
    RETRIES,
    ROUND,
    SELECTION_MAP,
    WINDOWS_PER_SECOND,
)
from pbd_ray.cluster.monitoring import Status
from pbd_ray.compression.finetune import LossTerms
from pbd_ray.compression.jobs import TEACHER_ROUND
from pbd_ray.search.sweeping import label


class AlignmentStatus(tune.Callback):
    """Of one Tune sweep over learning rates: a line for every epoch, and the status line in between."""

    def __init__(self, round: int, runs: int, until: int, seconds: float, say: Callable[[str], None]) -> None:
        """
        Args:
            runs: number of learning rates.
            until: epochs that each has behind it at the end.
        """
        self._runs, self._until, self._say = runs, until, say
        self._stage = "fit" if round == TEACHER_ROUND else "align"
        self._status = Status(f"{label(round)}: {self._stage}", seconds, say)
        self._begun: dict[float, int] = {}
        self._done: dict[float, int] = {}
        self._best: tuple[float, float] | None = None
        ROUND.set(round)
        for gauge in (WINDOWS_PER_SECOND, LOSS, EPOCHS_DONE, SELECTION_MAP):
            gauge.clear()

    def on_step_end(self, iteration: int, trials: Any, **_: Any) -> None:
        of = self._runs * self._until
        done, begun = sum(self._done.values()), sum(self._begun.values())
        best = "" if self._best is None else f"best selection mAP {self._best[0]:.4f} at {self._best[1]:g}"
        rates = f"{self._runs} learning rates"
        self._status(done / of, rates, f"epoch {done} of {of}", best, begun=begun / of)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if "total" not in result:
            return
        _, rate = trial.config["grid"]
        self._begun.setdefault(rate, result["epoch"])
        self._done[rate] = result["epoch"] + 1
        self._export(f"{rate:g}", result)
        quality = result.get("selection_map")
        shown = ""
        if quality is not None and not math.isnan(quality):
            shown = f", selection mAP {quality:.4f}"
            self._best = max(self._best or (-math.inf, 0.0), (quality, rate))
        self._say(
            f"{trial}: epoch {result['epoch'] + 1}/{self._until}, loss {result['total']:.4f}{shown}"
            f" ({result['seconds']:.0f} s, {result['windows_per_second']:.3g} windows/s)"
        )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Of what it did not train now, as it was done before or diverged, nothing is left."""
        _, rate = trial.config["grid"]
        skipped = self._until - self._done.get(rate, 0)
        self._begun[rate] = self._begun.get(rate, 0) + skipped
        self._done[rate] = self._until

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        RETRIES.add(1)

    def _export(self, rate: str, result: dict[str, Any]) -> None:
        for term in LossTerms.__dataclass_fields__:
            LOSS.set(result[term], learning_rate=rate, term=term)
        EPOCHS_DONE.set(result["epoch"] + 1, learning_rate=rate)
        WINDOWS_PER_SECOND.set(result["windows_per_second"], stage=f"learning rate {rate}")
        DECODE_WAIT.add(result["decode_wait_seconds"], stage=self._stage)
        if result["selection_map"] is not None:
            SELECTION_MAP.set(result["selection_map"], learning_rate=rate)
