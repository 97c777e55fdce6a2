"""Scoring every candidate removal of a round in one pass over the videos (paper, section 3.2).

Fused scoring: one decode and one pass of the full student a window; before block k the stream forks for
the candidate that drops k, and the fork runs to its end before the main stream goes on. So a window
costs n(n-1)/2 + n block forwards for n kept blocks, the undropped student included, and two token
tensors are alive at a time whatever the number of candidates.

Invariant: what a candidate yields depends on (weights, video, recipe) only, never on which other
candidates are alive, nor on slice or worker. On CPU windows of one video are batched, candidates never.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pbd_ray.compression.alignment import alignment_terms
from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.precision import autocast_context
from pbd_ray.config import Experiment
from pbd_ray.data.annotations import DETECTION_SCHEMA, Video
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.data.source import VideoSource, inference_batches, training_batch
from pbd_ray.detector.detector import Detector, DetectorOutput
from pbd_ray.detector.losses import assign_targets, detection_losses
from pbd_ray.detector.postprocess import WindowProposals, decode, detections_of_proposals

CANDIDATE_DETECTION_SCHEMA = DETECTION_SCHEMA.append(pa.field("candidate", pa.int32()))
VALUE_SCHEMA = pa.schema([("video", pa.string()), ("candidate", pa.int32()), ("value", pa.float64())])


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
    with autocast_context(job.experiment.autocast, job.device):
        if job.criterion == "map":
            tables = [_detections(job, student, video) for video in videos]
            return pa.concat_tables([CANDIDATE_DETECTION_SCHEMA.empty_table(), *tables])
        measure = _training_losses if job.criterion == "train_loss" else _block_changes
        rows = [
            {"video": video.id, "candidate": candidate, "value": value}
            for video in videos
            for candidate, value in measure(job, student, teacher, video).items()
        ]
        return pa.Table.from_pylist(rows, schema=VALUE_SCHEMA)


def fused_outputs(
    student: Detector, batch: WindowBatch, candidates: Collection[int], with_block_outputs: bool = False
) -> Iterator[tuple[int, DetectorOutput]]:
    """(candidate, what the student less that block says), ascending, the undropped student last.

    Bit for bit what a forward of each subnet alone gives: the same operations on the same shapes.
    """
    backbone = student.backbone
    tokens = backbone.embed(batch.frames)
    before: dict[int, torch.Tensor] = {}
    for block in student.kept_blocks:
        if block in candidates:
            yield block, _finish(student, tokens, block, batch, dict(before), with_block_outputs)
        tokens = backbone.run_block(block, tokens)
        if with_block_outputs:
            before[block] = tokens
    yield UNDROPPED, student.head_output(tokens, batch.mask, before)


def _finish(
    student: Detector,
    tokens: torch.Tensor,
    dropped: int,
    batch: WindowBatch,
    outputs: dict[int, torch.Tensor],
    with_block_outputs: bool,
) -> DetectorOutput:
    """Run a fork, whose next block is the dropped one, through the rest of the detector."""
    for block in student.kept_blocks:
        if block > dropped:
            tokens = student.backbone.run_block(block, tokens)
            if with_block_outputs:
                outputs[block] = tokens
    return student.head_output(tokens, batch.mask, outputs)


def _detections(job: ScoringJob, student: Detector, video: Video) -> pa.Table:
    config = student.config
    proposals: dict[int, list[WindowProposals]] = {c: [] for c in (*job.candidates, UNDROPPED)}
    for batch in inference_batches(job.source, video, config.grid, job.window_batch):
        for candidate, output in fused_outputs(student, batch.to(job.device), job.candidates):
            proposals[candidate].extend(decode(output, batch.windows, config.grid, config.postprocess))
    tables = []
    for candidate, pooled in proposals.items():
        table = detections_of_proposals(pooled, config.grid, config.postprocess)
        column = pa.array(np.full(table.num_rows, candidate, dtype=np.int32))
        tables.append(table.append_column(CANDIDATE_DETECTION_SCHEMA.field("candidate"), column))
    return pa.concat_tables(tables)


def _training_losses(
    job: ScoringJob, student: Detector, teacher: Detector | None, video: Video
) -> dict[int, float]:
    """Loss on the video's augmented training window, the same window for every candidate: drawn by
    (seed, round, video). One constant normaliser, the student's."""
    experiment = job.experiment
    head = student.config.head
    total = experiment.scoring.loss_terms == "total"
    seed_key, shortest = (experiment.seed, job.round), experiment.data.min_instance_fraction
    batch = training_batch(job.source, [video], student.config.grid, seed_key, shortest).to(job.device)
    targets = assign_targets(
        student.head.points, batch.segments, batch.labels, student.num_classes, head.center_radius
    )
    guide = teacher(batch.frames, batch.mask, with_block_outputs=True) if total and teacher else None
    losses = {}
    for candidate, output in fused_outputs(student, batch, job.candidates, with_block_outputs=total):
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
    job: ScoringJob, student: Detector, teacher: Detector | None, video: Video
) -> dict[int, float]:
    """Mean squared difference between each block's input and output over the video's windows."""
    sums = dict.fromkeys(job.candidates, 0.0)
    windows = 0
    for batch in inference_batches(job.source, video, student.config.grid, job.window_batch):
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
            proposals.extend(decode(output, batch.windows, config.grid, config.postprocess))
    return detections_of_proposals(proposals, config.grid, config.postprocess)
