"""The learning-rate schedule and the EMA decay as functions of the step, and where rungs end."""

from __future__ import annotations

import math

from pbd_ray.config import AlignmentConfig, OptimizerConfig

FLOOR = 1e-8
"""Where the release's cosine ends."""


def learning_rate(step: int, peak: float, config: OptimizerConfig, steps_per_epoch: int) -> float:
    """Rate used by 0-based `step`: linear warm-up from 0 at step 0, then cosine to `FLOOR`.

    Per iteration, as in the release (LinearWarmupCosineAnnealing); the cosine spans
    `schedule_epochs` even where training stops earlier.
    """
    warmup = int(config.warmup_epochs * steps_per_epoch)
    total = config.schedule_epochs * steps_per_epoch
    if step < warmup:
        return peak * step / max(1, warmup - 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return FLOOR + (peak - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(step: int, config: OptimizerConfig) -> float:
    """Decay after 0-based `step`: constant, or min(decay, (1 + t) / (10 + t)) with `ema_warmup`."""
    if config.ema_warmup:
        return min(config.ema_decay, (1 + step) / (10 + step))
    return config.ema_decay


def rung_ends(config: AlignmentConfig) -> tuple[int, ...]:
    """Numbers of epochs at which rungs of successive halving may end; the last is the run's end, and the
    only one without halving."""
    ends, epochs = [], config.optimizer.epochs
    if config.halving is not None:
        end = config.halving.first_epochs
        while end < epochs:
            ends.append(end)
            end *= 2
    return (*ends, epochs)
