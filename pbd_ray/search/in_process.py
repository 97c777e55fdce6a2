"""The controller's expensive steps in this process, without Ray: for tests and for debugging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pbd_ray.compression.blocks import Model, to_detector
from pbd_ray.compression.epochs import EpochReport, run_epochs
from pbd_ray.compression.finetune import Diverged, FineTuning
from pbd_ray.compression.jobs import FineTuneJob, alignment_job
from pbd_ray.compression.precision import autocast_context
from pbd_ray.compression.scoring import ScoringJob, score_videos
from pbd_ray.config import Recipe, UserError
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import VideoSource
from pbd_ray.data.windows import Window
from pbd_ray.metrics.cost import measure_latency
from pbd_ray.search.rate_search import GridRate, RateRun, chosen_alignment, grid_of, search_rates
from pbd_ray.search.state import Alignment, AlignTask, Feed, Steps, SweepTask

Say = Callable[[str], None]


def in_process_steps(
    recipe: Recipe,
    split: Split,
    source: VideoSource,
    say: Say,
    seen: Callable[[Window], None] | None = None,
) -> Steps:
    """Steps that run one after the other, right here.

    Args:
        seen: told how far a sweep is inside a video (`ScoringJob.seen`).
    """
    videos = {video.id: video for video in split.everything().videos}
    num_classes = len(split.fit.classes)
    device = torch.device(recipe.execution.device)

    def detector(model: Model) -> Any:
        return to_detector(model, recipe.experiment.detector, num_classes).to(device)

    def sweep(task: SweepTask, feed: Feed) -> Mapping[str, Any]:
        job = ScoringJob(
            experiment=recipe.experiment,
            criterion=task.criterion,
            candidates=task.candidates,
            round=task.round,
            source=source,
            window_batch=recipe.execution.window_batch,
            candidate_batch=recipe.execution.candidate_batch,
            decoding_threads=recipe.execution.decoding_threads,
            device=device,
            seen=seen,
        )
        student = detector(task.model)
        teacher = detector(task.teacher) if task.teacher is not None else None
        while (work := feed.take()) is not None:
            racing = replace(job, candidates=work.candidates)
            wanted = [videos[name] for name in work.piece.videos]
            try:
                rows = score_videos(racing, student, teacher, wanted)
            except UserError as error:
                feed.refuse(work, error)
            else:
                feed.give(work, rows)
        return {}

    def align(task: AlignTask) -> Alignment:
        job = alignment_job(recipe, split, source, task.round, task.student, task.teacher)
        return fit_grid(job, grid_of(job.config, task.prior), say, device)

    def latency(model: Model) -> Mapping[str, float]:
        with autocast_context(recipe.experiment.autocast, device):
            measured = measure_latency(detector(model), device=device)
        return {"p50_ms": measured.p50_ms, "p95_ms": measured.p95_ms}

    return Steps(sweep=sweep, align=align, latency=latency)


def fit_grid(job: FineTuneJob, grid: Sequence[GridRate], say: Say, device: torch.device) -> Alignment:
    """Fine-tune with the learning rates of a grid in turn; the best on the selection videos is returned.

    Raises:
        Diverged: every learning rate did.
    """
    begun: dict[GridRate, tuple[Iterator[tuple[EpochReport, FineTuning]], list[EpochReport]]] = {}
    tunings: dict[GridRate, FineTuning] = {}

    def run_to(entry: GridRate, end: int) -> RateRun:
        if entry not in begun:
            own = replace(job, learning_rate=entry.rate, grid_index=entry.index)
            begun[entry] = run_epochs(own, device=device), []
        epochs, history = begun[entry]
        try:
            while len(history) < end:
                report, tunings[entry] = next(epochs)
                history.append(report)
                loss = report.losses.total
                say(f"learning rate {entry.rate:.3g}: epoch {report.epoch + 1}, loss {loss:.4f}")
        except Diverged as reason:
            say(f"learning rate {entry.rate:g}: {reason}")
            return RateRun(tuple(history), str(reason))
        return RateRun(tuple(history))

    runs = search_rates(
        grid, job.config, lambda entries, end: {entry: run_to(entry, end) for entry in entries}
    )
    return chosen_alignment(runs, job.config.optimizer.epochs, lambda chosen: tunings[chosen].best_model())
