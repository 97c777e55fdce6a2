"""The controller's expensive steps in this process, without Ray: for tests and for debugging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pbd_ray.compression.blocks import Model, to_detector
from pbd_ray.compression.epochs import EpochReport, choose_run, curves_table, run_epochs
from pbd_ray.compression.finetune import Diverged
from pbd_ray.compression.jobs import FineTuneJob, alignment_job
from pbd_ray.compression.precision import autocast_context
from pbd_ray.compression.scoring import ScoringJob, score_videos
from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import VideoSource
from pbd_ray.metrics.cost import measure_latency
from pbd_ray.search.state import Alignment, AlignTask, Feed, Steps, SweepTask

Say = Callable[[str], None]


def in_process_steps(recipe: Recipe, split: Split, source: VideoSource, say: Say) -> Steps:
    """Steps that run one after the other, right here."""
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
        )
        student = detector(task.model)
        teacher = detector(task.teacher) if task.teacher is not None else None
        while (work := feed.take()) is not None:
            racing = replace(job, candidates=work.candidates)
            wanted = [videos[name] for name in work.piece.videos]
            feed.give(work, score_videos(racing, student, teacher, wanted))
        return {}

    def align(task: AlignTask) -> Alignment:
        job = alignment_job(recipe, split, source, task.round, task.student, task.teacher)
        return fit_grid(job, recipe.experiment.alignment.learning_rates, say)

    def latency(model: Model) -> Mapping[str, float]:
        with autocast_context(recipe.experiment.autocast, device):
            measured = measure_latency(detector(model), device=device)
        return {"p50_ms": measured.p50_ms, "p95_ms": measured.p95_ms}

    return Steps(sweep=sweep, align=align, latency=latency)


def fit_grid(job: FineTuneJob, learning_rates: Sequence[float], say: Say) -> Alignment:
    """Fine-tune with every learning rate in turn; the best on the selection videos is returned.

    Raises:
        Diverged: every learning rate did.
    """
    histories: list[list[EpochReport]] = []
    models: list[Model] = []
    problems: list[str] = []
    for index, rate in enumerate(learning_rates):
        history: list[EpochReport] = []
        try:
            for report, run in run_epochs(replace(job, learning_rate=rate, grid_index=index)):
                tuning = run
                history.append(report)
                say(f"learning rate {rate:.3g}: epoch {report.epoch + 1}, loss {report.losses.total:.4f}")
        except Diverged as reason:
            problems.append(f"learning rate {rate:g}: {reason}")
            say(problems[-1])
            continue
        histories.append(history)
        models.append(tuning.best_model())
    if not models:
        raise Diverged("; ".join(problems))
    chosen, epoch = choose_run(histories)
    return Alignment(
        learning_rate=histories[chosen][0].learning_rate,
        epoch=epoch + 1,
        model=models[chosen],
        curves=curves_table(histories),
        measured={"failed": problems},
    )
