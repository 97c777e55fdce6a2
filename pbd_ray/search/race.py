"""A round's race: its stages, and who goes on at each barrier. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.candidates import SweepRows, standings
from pbd_ray.compression.racing import Lag, barriers, beyond_doubt
from pbd_ray.config import Experiment
from pbd_ray.data.annotations import Annotations, Video
from pbd_ray.data.video_classes import scored_against
from pbd_ray.search.slices import plan_stages, race_order
from pbd_ray.search.state import Criterion, Slice


@dataclass(frozen=True)
class Verdict:
    """What a barrier says."""

    lags: tuple[Lag, ...]
    stopped: tuple[int, ...]


def is_raced(experiment: Experiment, criterion: Criterion) -> bool:
    """mse scores all blocks in one pass: stopping some would save nothing."""
    return experiment.scoring.racing is not None and criterion != "mse"


def plan_race(videos: Annotations, experiment: Experiment, round: int, count: int) -> tuple[Slice, ...]:
    """Slices of a race over `videos`, at most `count` a stage, in the round's random order."""
    racing = experiment.scoring.racing
    assert racing is not None, "racing is off"
    order = race_order(videos.videos, experiment.seed, round)
    truth = scored_against(videos)
    instances = _instances(order, truth)
    return plan_stages(order, barriers(instances, racing), experiment.detector.grid, count)


def judge(
    sweep: SweepRows, experiment: Experiment, videos: Annotations, round: int, barrier: int, of: int
) -> Verdict:
    """Who is stopped at one of the race's barriers.

    Args:
        sweep: rows of the candidates in the race, all on the videos of the stages that have ended.
        videos: the whole scoring set.
        barrier: 0 for the first of `of`; each may spend an equal part of the error rate.
    """
    racing = experiment.scoring.racing
    assert racing is not None, "racing is off"
    lags = standings(sweep, experiment, videos, (round, barrier))
    return Verdict(lags, beyond_doubt(lags, racing.error_rate / of))


def videos_by_stage(plan: Sequence[Slice]) -> tuple[tuple[str, ...], ...]:
    """For every stage the videos of it and of all stages before, in the order of ids."""
    stages = max(piece.stage for piece in plan) + 1
    return tuple(
        tuple(sorted(name for piece in plan if piece.stage <= stage for name in piece.videos))
        for stage in range(stages)
    )


def videos_of_arms(
    plan: Sequence[Slice], raced: Sequence[tuple[int, ...]], candidates: Sequence[int], undropped: bool
) -> dict[int, tuple[str, ...]]:
    """Which videos every arm counts on: those of the stages it was in.

    Args:
        raced: for each stage that was opened, the candidates in it.
    """
    seen = videos_by_stage(plan)
    last = {block: max(s for s, alive in enumerate(raced) if block in alive) for block in candidates}
    if undropped:
        last[UNDROPPED] = len(raced) - 1
    return {block: seen[stage] for block, stage in last.items()}


def _instances(order: Sequence[Video], truth: Annotations) -> npt.NDArray[np.int64]:
    labels = {video.id: video.labels for video in truth.videos}
    classes = len(truth.classes)
    return np.stack([np.bincount(labels[video.id], minlength=classes) for video in order])
