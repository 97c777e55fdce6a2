"""A scoring worker: the actor that scores the slices it is handed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Video
from pbd_ray.search.state import Model, SweepTask, Work

_LATENCY_WARMUP, _LATENCY_REPEATS = 3, 15


@dataclass(frozen=True, eq=False)
class WorkerSpec:
    """What every worker of a run needs to know; sent once, when it starts."""

    recipe: Recipe
    num_classes: int
    videos: Mapping[str, Video]


@dataclass(frozen=True, eq=False)
class ScoredSlice:
    """What comes back of a slice."""

    rows: pa.Table
    """As of `compression.scoring.score_videos`."""
    windows: int
    decode_wait_seconds: float


class ScoringWorker:
    """Holds one student at a time and scores the slices it is handed. torch is imported on the worker."""

    def __init__(self, spec: WorkerSpec) -> None:
        import torch

        from pbd_ray.data.source import local_source

        self._spec = spec
        self._device = torch.device(spec.recipe.execution.device)
        self._source = local_source(spec.recipe)
        torch.set_num_threads(spec.recipe.execution.threads_per_worker)

    def load(self, task: SweepTask, student: Model, teacher: Model | None) -> str:
        """Take over the models of a sweep; returns the name of this worker's node."""
        from pbd_ray.compression.scoring import ScoringJob

        spec = self._spec
        self._job = ScoringJob(
            experiment=spec.recipe.experiment,
            criterion=task.criterion,
            candidates=task.candidates,
            round=task.round,
            source=self._source,
            window_batch=spec.recipe.execution.window_batch,
            candidate_batch=spec.recipe.execution.candidate_batch,
            decoding_threads=spec.recipe.execution.decoding_threads,
            device=self._device,
        )
        self._student = self._detector(student)
        self._teacher = self._detector(teacher) if teacher is not None else None
        # With the id: several nodes of one machine share its address.
        return f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"

    def score(self, work: Work) -> ScoredSlice:
        """One slice, for the candidates that it was handed out with."""
        from pbd_ray.compression.scoring import score_videos
        from pbd_ray.data.tally import Tally

        videos = [self._spec.videos[name] for name in work.piece.videos]
        tally = Tally()
        job = replace(self._job, candidates=work.candidates, tally=tally)
        rows = score_videos(job, self._student, self._teacher, videos)
        return ScoredSlice(rows, tally.windows, tally.wait_seconds)

    def latency(self, model: Model) -> dict[str, float]:
        """Milliseconds of one window through the detector, with this worker's resources."""
        from pbd_ray.compression.precision import autocast_context
        from pbd_ray.metrics.cost import measure_latency

        with autocast_context(self._spec.recipe.experiment.autocast, self._device):
            measured = measure_latency(
                self._detector(model), warmup=_LATENCY_WARMUP, repeats=_LATENCY_REPEATS, device=self._device
            )
        return {"p50_ms": measured.p50_ms, "p95_ms": measured.p95_ms}

    def _detector(self, model: Model) -> Any:
        from pbd_ray.compression.blocks import to_detector

        return to_detector(model, self._spec.recipe.experiment.detector, self._spec.num_classes).to(
            self._device
        )
