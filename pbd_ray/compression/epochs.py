"""A fine-tuning run epoch by epoch: batches, losses, selection mAP, the best epoch.

The same generator runs in one process and in every Ray Train worker. A run is described by values
only, so that it can be sent anywhere; its history and `FineTuning.state` resume it at any epoch.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pbd_ray.compression.blocks import Model
from pbd_ray.compression.finetune import ONE_PROCESS, Collective, FineTuning, LossTerms
from pbd_ray.compression.jobs import FineTuneJob
from pbd_ray.compression.precision import autocast_context
from pbd_ray.compression.schedule import rung_ends
from pbd_ray.compression.scoring import detect_video
from pbd_ray.config import AlignmentConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA, Video
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.data.source import training_batch
from pbd_ray.data.tally import Tally
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.metrics.mean_ap import mean_average_precision

WORST = (-math.inf, -math.inf)


@dataclass(frozen=True)
class EpochCost:
    """What an epoch took: measured, never hashed."""

    seconds: float
    """Selection included."""
    windows_per_second: float
    """Of all ranks, in training."""
    peak_memory_bytes: int
    """Of this rank's process since it began: on the GPU, else resident."""
    decode_wait_seconds: float = 0.0
    """Of this rank, in training."""


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did. Selection values are None where they were not measured."""

    epoch: int
    """0-based."""
    learning_rate: float
    losses: LossTerms
    selection_map: float | None
    """By `evaluation.headline_tiou`, with EMA weights, on the selection videos."""
    selection_average_map: float | None
    best: bool
    """The best so far."""
    cost: EpochCost


def run_epochs(
    job: FineTuneJob,
    *,
    device: torch.device = torch.device("cpu"),
    collective: Collective = ONE_PROCESS,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    history: Sequence[EpochReport] = (),
    state: Mapping[str, Tensor] | None = None,
    until: int | None = None,
) -> Iterator[tuple[EpochReport, FineTuning]]:
    """Train from where `history` and `state` end to the last epoch; yields after each.

    The epoch with the best selection mAP is remembered (ties: the better average mAP, then the
    earlier epoch), so `FineTuning.best_model` is the run's outcome.

    Args:
        until: number of epochs to stop at, before the schedule's end.

    Raises:
        Diverged: a loss is not finite.
    """
    options = job.config.optimizer
    measured = selection_epochs(job.config)
    tuning = _tuning(job, device, collective, wrap)
    if state is not None:
        tuning.load_state(state)
    elif job.standardize:
        tuning.standardize_features(_batches(job, 0, collective))
    best = max((selection_rank(report) for report in history), default=WORST)
    for epoch in range(len(history), options.epochs if until is None else until):
        started = time.monotonic()
        tally = Tally()
        losses = _train(tuning, tally.count(_batches(job, epoch, collective)))
        training = time.monotonic() - started
        selection_map = average_map = None
        is_best = False
        if epoch + 1 in measured:
            selection_map, average_map = _selection_map(job, tuning, collective)
            is_best = (selection_map, average_map) > best
            if is_best:
                best = (selection_map, average_map)
                tuning.remember_best()
        windows = sum(len(videos) for videos in epoch_batches(job, epoch))
        cost = EpochCost(
            time.monotonic() - started, windows / training, _peak_memory_bytes(device), tally.wait_seconds
        )
        yield (
            EpochReport(epoch, job.learning_rate, losses, selection_map, average_map, is_best, cost),
            tuning,
        )


def selection_epochs(config: AlignmentConfig) -> frozenset[int]:
    """Numbers of epochs after which selection mAP is measured: every `select_every_epochs`, at the ends of
    rungs, and after the last."""
    epochs, every = config.optimizer.epochs, config.select_every_epochs
    return frozenset((*range(every, epochs + 1, every), *rung_ends(config)))


def selection_rank(report: EpochReport) -> tuple[float, float]:
    """Sorts epochs by selection mAP, then by average mAP; one that was not measured is the worst."""
    if report.selection_map is None or report.selection_average_map is None:
        return WORST
    return (report.selection_map, report.selection_average_map)


def finished_model(job: FineTuneJob, state: Mapping[str, Tensor]) -> Model:
    """The best model of a run, LoRA merged, from the state of its last epoch."""
    tuning = _tuning(job, torch.device("cpu"), ONE_PROCESS, lambda module: module)
    tuning.load_state(state)
    return tuning.best_model()


def epoch_batches(job: FineTuneJob, epoch: int) -> tuple[tuple[Video, ...], ...]:
    """The epoch's global batches of fit videos: every video once in an order drawn by (seed, round,
    epoch); an incomplete last batch is left out unless it is the only one."""
    videos, size = job.fit.videos, job.config.optimizer.batch_size
    order = np.random.default_rng((job.experiment.seed, job.round, epoch)).permutation(len(videos))
    size = min(size, len(videos))
    starts = range(0, len(videos) - size + 1, size)
    return tuple(tuple(videos[index] for index in order[start : start + size]) for start in starts)


def history_to_json(history: Sequence[EpochReport]) -> str:
    return json.dumps([asdict(report) for report in history])


def history_from_json(text: str) -> tuple[EpochReport, ...]:
    """Inverse of `history_to_json`."""
    return tuple(
        EpochReport(**{**row, "losses": LossTerms(**row["losses"]), "cost": EpochCost(**row["cost"])})
        for row in json.loads(text)
    )


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def _tuning(
    job: FineTuneJob,
    device: torch.device,
    collective: Collective,
    wrap: Callable[[nn.Module], nn.Module],
) -> FineTuning:
    return FineTuning(
        job.student,
        job.teacher,
        job.experiment.detector,
        len(job.fit.classes),
        job.config,
        job.learning_rate,
        len(epoch_batches(job, 0)),
        (job.experiment.seed, job.round, job.grid_index),
        guide_config=job.guide,
        autocast=job.experiment.autocast,
        device=device,
        collective=collective,
        wrap=wrap,
    )


def _train(tuning: FineTuning, batches: Iterator[WindowBatch]) -> LossTerms:
    steps = [tuple(asdict(tuning.train_step(batch)).values()) for batch in batches]
    return LossTerms(*np.mean(steps, axis=0).tolist())


def _batches(job: FineTuneJob, epoch: int, collective: Collective) -> Iterator[WindowBatch]:
    """This rank's share of every global batch of the epoch, augmented by (seed, round, epoch, video)."""
    seed_key = (job.experiment.seed, job.round, epoch)
    grid, data = job.experiment.detector.grid, job.experiment.data
    for videos in epoch_batches(job, epoch):
        mine = videos[collective.rank :: collective.world_size]
        yield training_batch(job.source, mine, grid, seed_key, data.min_instance_fraction)


def _selection_map(job: FineTuneJob, tuning: FineTuning, collective: Collective) -> tuple[float, float]:
    """Headline and average mAP of the EMA student on the selection videos, shared over the ranks."""
    tables = [DETECTION_SCHEMA.empty_table()]
    precision = autocast_context(job.experiment.autocast, tuning.device)
    with tuning.ema_student() as student, precision:
        for video in job.selection.videos[collective.rank :: collective.world_size]:
            tables.append(detect_video(student, video, job.source, job.window_batch, tuning.device))
    detections = collective.gather(pa.concat_tables(tables))
    rules, videos = job.experiment.evaluation, [video.id for video in job.selection.videos]
    truth = scored_against(job.selection)
    quality = mean_average_precision(
        truth.ground_truth(), named(job.selection, detections), rules.tious, len(truth.classes), videos
    )
    return quality.at(rules.headline_tiou), quality.average_map
