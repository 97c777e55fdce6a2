"""Scoring every candidate removal of a round in one pass over the videos (paper, section 3.2).

Fused scoring: one decode and one pass of the full student a window; before block k the stream forks for
the candidate that drops k, and the fork runs to its end before the main stream goes on. So a window
costs n(n-1)/2 + n block forwards for n kept blocks, the undropped student included, and two token
tensors are alive at a time whatever the number of candidates. Decoding runs ahead of this in threads.

Invariant: what a candidate yields depends on (weights, video, recipe) only, never on which other
candidates are alive, nor on slice or worker. On CPU windows of one video are batched, candidates never;
where a GPU batches them (`candidate_batch`), the last bits of one may depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from pbd_ray.compression.alignment import alignment_terms
from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.precision import autocast_context
from pbd_ray.config import Experiment, GridConfig
from pbd_ray.data.ahead import ahead
from pbd_ray.data.annotations import DETECTION_SCHEMA, Video
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.data.source import VideoSource, inference_batches, training_batch
from pbd_ray.data.tally import Tally
from pbd_ray.data.windows import Window
from pbd_ray.detector.detector import Detector, DetectorOutput
from pbd_ray.detector.losses import assign_targets, detection_losses
from pbd_ray.detector.postprocess import WindowProposals, decode, detections_of_proposals

CANDIDATE_DETECTION_SCHEMA = DETECTION_SCHEMA.append(pa.field("candidate", pa.int32()))
VALUE_SCHEMA = pa.schema([("video", pa.string()), ("candidate", pa.int32()), ("value", pa.float64())])

DECODED_BATCHES = 1
"""Batches that may lie decoded beside those the decoding threads are at."""


@dataclass(frozen=True, eq=False)
class ScoringJob:
    """What a worker needs to know, besides the models, to score any video of a sweep.

    With criterion `map` and no candidates it is an evaluation: the rows are the student's detections.
    """

    experiment: Experiment
    criterion: str
    candidates: tuple[int, ...]
    round: int
    source: VideoSource
    window_batch: int
    device: torch.device
    candidate_batch: int = 1
    """Candidates in one forward pass: 1 on CPU (`fused_outputs`, together)."""
    decoding_threads: int = 0
    """Threads that decode ahead of compute; 0: none."""
    seen: Callable[[Window], None] | None = None
    """Criterion map: told the last window of every batch, once the detectors have seen it."""
    tally: Tally | None = None
    """Counts the windows, and the time spent waiting for them."""


@torch.inference_mode()
def score_videos(
    job: ScoringJob, student: Detector, teacher: Detector | None, videos: Sequence[Video]
) -> pa.Table:
    """Rows of every candidate and the undropped student (candidate -1) for each video.

    Returns:
        criterion map: CANDIDATE_DETECTION_SCHEMA; train_loss and mse: VALUE_SCHEMA with the video's
        mean loss of the candidate's subnet, or mean squared difference between the input and output
        of the candidate block.
    """
    map_scores = job.criterion == "map"
    streams = [partial(_batches, job, student.config.grid, video) for video in videos]
    tables = [(CANDIDATE_DETECTION_SCHEMA if map_scores else VALUE_SCHEMA).empty_table()]
    with (
        autocast_context(job.experiment.autocast, job.device),
        closing(ahead(streams, job.decoding_threads, DECODED_BATCHES)) as decoded,
    ):
        for video, batches in zip(videos, decoded, strict=True):
            if job.tally is not None:
                batches = job.tally.count(batches)
            if map_scores:
                tables.append(_detections(job, student, batches))
                continue
            measure = _training_losses if job.criterion == "train_loss" else _block_changes
            rows = [
                {"video": video.id, "candidate": candidate, "value": value}
                for candidate, value in measure(job, student, teacher, batches).items()
            ]
            tables.append(pa.Table.from_pylist(rows, schema=VALUE_SCHEMA))
    return pa.concat_tables(tables)


def _batches(job: ScoringJob, grid: GridConfig, video: Video) -> Iterator[WindowBatch]:
    batches = _decoded_batches(job, grid, video)
    return map(WindowBatch.pinned, batches) if job.device.type == "cuda" else batches


def _decoded_batches(job: ScoringJob, grid: GridConfig, video: Video) -> Iterator[WindowBatch]:
    """A video's windows; for train_loss one augmented window, drawn by (seed, round, video)."""
    if job.criterion == "train_loss":
        seed_key, shortest = (job.experiment.seed, job.round), job.experiment.data.min_instance_fraction
        yield training_batch(job.source, [video], grid, seed_key, shortest)
    else:
        yield from inference_batches(job.source, video, grid, job.window_batch)


def fused_outputs(
    student: Detector,
    batch: WindowBatch,
    candidates: Collection[int],
    with_block_outputs: bool = False,
    together: int = 1,
) -> Iterator[tuple[int, DetectorOutput]]:
    """(candidate, what the student less that block says), ascending, the undropped student last.

    Args:
        together: forks that run as one batch, stacked along its first dimension. With 1 the outputs are bit
            for bit those of a forward of each subnet alone: the same operations on the same shapes. With
            more they differ in the last bits, and the stack is `together` token tensors instead of one.
    """
    backbone, kept = student.backbone, student.kept_blocks
    alive = [block for block in kept if block in candidates]
    tokens = backbone.embed(batch.frames)
    before: dict[int, torch.Tensor] = {}  # block outputs of the main stream
    rows, empty = len(tokens), tokens.new_empty(0)
    stack = empty  # the streams of `forks`, in their order
    forks: dict[int, dict[int, torch.Tensor]] = {}  # candidate -> its block outputs

    def run_forks(block: int) -> None:
        nonlocal stack
        stack = backbone.run_block(block, stack)
        if with_block_outputs:
            for outputs, own in zip(forks.values(), stack.split(rows), strict=True):
                outputs[block] = own

    for block in kept:
        if forks:
            run_forks(block)
        if block in alive:
            stack = torch.cat((stack, tokens)) if forks else tokens
            forks[block] = dict(before)
            if len(forks) == together or block == alive[-1]:
                for later in kept[kept.index(block) + 1 :]:
                    run_forks(later)
                for index, candidate in enumerate(forks):
                    own = slice(index * rows, (index + 1) * rows)
                    yield candidate, student.head_output(stack[own], batch.mask, forks[candidate])
                stack, forks = empty, {}
        tokens = backbone.run_block(block, tokens)
        if with_block_outputs:
            before[block] = tokens
    yield UNDROPPED, student.head_output(tokens, batch.mask, before)


def _detections(job: ScoringJob, student: Detector, batches: Iterator[WindowBatch]) -> pa.Table:
    config = student.config
    proposals: dict[int, list[WindowProposals]] = {c: [] for c in (*job.candidates, UNDROPPED)}
    for batch in batches:
        outputs = fused_outputs(student, batch.to(job.device), job.candidates, together=job.candidate_batch)
        for candidate, output in outputs:
            proposals[candidate].extend(decode(output, batch.windows, config.postprocess))
        if job.seen is not None:
            job.seen(batch.windows[-1])
    tables = []
    for candidate, pooled in proposals.items():
        table = detections_of_proposals(pooled, config.grid, config.postprocess)
        column = pa.array(np.full(table.num_rows, candidate, dtype=np.int32))
        tables.append(table.append_column(CANDIDATE_DETECTION_SCHEMA.field("candidate"), column))
    return pa.concat_tables(tables)


def _training_losses(
    job: ScoringJob, student: Detector, teacher: Detector | None, batches: Iterator[WindowBatch]
) -> dict[int, float]:
    """Loss on the video's augmented training window, the same window for every candidate. One constant
    normaliser, the student's."""
    experiment = job.experiment
    head = student.config.head
    total = experiment.scoring.loss_terms == "total"
    batch = next(batches).to(job.device)
    targets = assign_targets(
        student.head.points, batch.segments, batch.labels, student.num_classes, head.center_radius
    )
    guide = teacher(batch.frames, batch.mask, with_block_outputs=True) if total and teacher else None
    losses = {}
    for candidate, output in fused_outputs(student, batch, job.candidates, total, job.candidate_batch):
        supervised = detection_losses(
            output, batch.segments, batch.labels, head, student.head.loss_normalizer, targets=targets
        )
        positive = targets.positive(output.mask)
        terms = alignment_terms(
            output,
            guide,
            positive,
            experiment.alignment,
            valid_points=max(1.0, float(output.mask.sum())),
            positives=max(1.0, float(positive.sum())),
        )
        losses[candidate] = float(supervised.total + terms.weighted(experiment.alignment))
    return losses


def _block_changes(
    job: ScoringJob, student: Detector, teacher: Detector | None, batches: Iterator[WindowBatch]
) -> dict[int, float]:
    """Mean squared difference between each block's input and output over the video's windows."""
    sums = dict.fromkeys(job.candidates, 0.0)
    windows = 0
    for batch in batches:
        tokens = student.backbone.embed(batch.to(job.device).frames)
        for block in student.kept_blocks:
            changed = student.backbone.run_block(block, tokens)
            if block in sums:
                sums[block] += float((changed - tokens).square().mean(dtype=torch.float64)) * len(batch.mask)
            tokens = changed
        windows += len(batch.mask)
    return {block: value / windows for block, value in sums.items()}


def detect_video(
    student: Detector, video: Video, source: VideoSource, window_batch: int, device: torch.device
) -> pa.Table:
    """Detections of one video as it stands, DETECTION_SCHEMA: `student` in eval mode on `device`."""
    config = student.config
    proposals: list[WindowProposals] = []
    with torch.inference_mode():
        for batch in inference_batches(source, video, config.grid, window_batch):
            batch = batch.to(device)
            output = student(batch.frames, batch.mask)
            proposals.extend(decode(output, batch.windows, config.postprocess))
    return detections_of_proposals(proposals, config.grid, config.postprocess)
