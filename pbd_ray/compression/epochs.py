"""A fine-tuning run epoch by epoch: batches, losses, selection mAP, the best epoch.

The same generator runs in one process and in every Ray Train worker. A run is described by values
only, so that it can be sent anywhere; its history and `FineTuning.state` resume it at any epoch.
"""

from __future__ import annotations

import math
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
from pbd_ray.compression.scoring import detect_video
from pbd_ray.data.annotations import DETECTION_SCHEMA, Video
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.data.source import training_batch
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.metrics.mean_ap import mean_average_precision


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
    seconds: float
    """Measured; never hashed."""


def run_epochs(
    job: FineTuneJob,
    *,
    device: torch.device = torch.device("cpu"),
    collective: Collective = ONE_PROCESS,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    history: Sequence[EpochReport] = (),
    state: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[EpochReport, FineTuning]]:
    """Train from where `history` and `state` end to the last epoch; yields after each.

    The epoch with the best selection mAP is remembered (ties: the better average mAP, then the
    earlier epoch), so `FineTuning.best_model` is the run's outcome.

    Raises:
        Diverged: a loss is not finite.
    """
    options = job.config.optimizer
    tuning = _tuning(job, device, collective, wrap)
    if state is not None:
        tuning.load_state(state)
    elif job.standardize:
        tuning.standardize_features(_batches(job, 0, collective))
    best = max((_rank(report) for report in history), default=(-math.inf, -math.inf))
    for epoch in range(len(history), options.epochs):
        started = time.monotonic()
        losses = _train(job, tuning, epoch, collective)
        selection_map = average_map = None
        is_best = False
        if (epoch + 1) % job.config.select_every_epochs == 0 or epoch + 1 == options.epochs:
            selection_map, average_map = _selection_map(job, tuning, collective)
            is_best = (selection_map, average_map) > best
            if is_best:
                best = (selection_map, average_map)
                tuning.remember_best()
        yield (
            EpochReport(
                epoch,
                job.learning_rate,
                losses,
                selection_map,
                average_map,
                is_best,
                time.monotonic() - started,
            ),
            tuning,
        )


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


def curves_table(histories: Sequence[Sequence[EpochReport]]) -> pa.Table:
    """Every run's epochs as one table, without anything measured: it enters the round's hash."""
    rows = [
        {
            "learning_rate": report.learning_rate,
            "epoch": report.epoch,
            **asdict(report.losses),
            "selection_map": report.selection_map,
            "selection_average_map": report.selection_average_map,
        }
        for history in histories
        for report in history
    ]
    return pa.Table.from_pylist(rows, schema=CURVES_SCHEMA)


CURVES_SCHEMA = pa.schema(
    [
        ("learning_rate", pa.float64()),
        ("epoch", pa.int32()),
        *((name, pa.float64()) for name in LossTerms.__dataclass_fields__),
        ("selection_map", pa.float64()),
        ("selection_average_map", pa.float64()),
    ]
)


def choose_run(histories: Sequence[Sequence[EpochReport]]) -> tuple[int, int]:
    """(index of the run, epoch) with the best selection mAP; ties: better average mAP, then the lower
    learning rate, then the earlier epoch."""
    ranked = [
        ((*_rank(report), -report.learning_rate, -report.epoch), index, report.epoch)
        for index, history in enumerate(histories)
        for report in history
        if report.selection_map is not None
    ]
    _, index, epoch = max(ranked)
    return index, epoch


def _rank(report: EpochReport) -> tuple[float, float]:
    if report.selection_map is None or report.selection_average_map is None:
        return (-math.inf, -math.inf)
    return (report.selection_map, report.selection_average_map)


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
        autocast=job.experiment.autocast,
        device=device,
        collective=collective,
        wrap=wrap,
    )


def _train(job: FineTuneJob, tuning: FineTuning, epoch: int, collective: Collective) -> LossTerms:
    steps = [tuple(asdict(tuning.train_step(batch)).values()) for batch in _batches(job, epoch, collective)]
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
