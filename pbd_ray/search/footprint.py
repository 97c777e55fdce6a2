"""How much a run writes at most, from the shapes of its detector.

With P the bytes of the detector's tensors, T those of the tensors that fine-tuning trains, L learning rates,
R rounds (with all that could be rolled back), V videos, n blocks, and `max_detections` M of a video:

- bundles: the teacher's and one a round, (R + 1) P;
- checkpoints: a run keeps one, and two while it replaces it. One holds the trained tensors five times
  (themselves, their EMA, the best EMA, two moments of AdamW): 2 L 5 T for the largest grid. They go when
  their round is committed, so one round counts;
- a name and a shape beside every tensor, at most TENSOR_BYTES;
- tables: a row is a detection of at most ROW_BYTES. Scoring writes M rows a video for each candidate and the
  undropped student, once for every block that is dropped (nothing where `scoring.drops` names the blocks);
  evaluations M rows a video.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pbd_ray.compression.lora import prepare_student
from pbd_ray.config import AlignmentConfig, Experiment
from pbd_ray.data.annotations import Split
from pbd_ray.detector.detector import Detector
from pbd_ray.search.stopping import most_rounds

ROW_BYTES = 48
"""Start, end and score as float64, label and candidate as int32, and what Parquet adds; a video's name is
stored once. Parquet compresses; this does not count on it."""
TENSOR_BYTES = 256
STATES_IN_CHECKPOINT = 5
CHECKPOINTS_AT_ONCE = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes that are written at most."""

    bundles: int
    checkpoints: int
    tables: int

    @property
    def total(self) -> int:
        return self.bundles + self.checkpoints + self.tables


def compression_footprint(experiment: Experiment, split: Split) -> Footprint:
    """What a whole compression writes to its run directory."""
    classes = len(split.fit.classes)
    grids = [checkpoint_bytes(experiment, experiment.alignment, classes)]
    if experiment.teacher.source == "train":
        grids.append(teacher_checkpoint_bytes(experiment, classes))
    rounds, blocks = most_rounds(experiment), experiment.detector.backbone.depth
    drops = experiment.max_drops if experiment.scoring.drops is None else 0
    scored = drops * len(split.fit.videos) * (blocks + 1)
    evaluated = (rounds + 1) * (len(split.test.videos) + len(split.selection.videos))
    rows = experiment.detector.postprocess.max_detections * (scored + evaluated)
    return Footprint((rounds + 1) * bundle_bytes(experiment, classes), max(grids), rows * ROW_BYTES)


def teacher_footprint(experiment: Experiment, classes: int) -> Footprint:
    """What fitting a teacher writes."""
    return Footprint(bundle_bytes(experiment, classes), teacher_checkpoint_bytes(experiment, classes), 0)


def bundle_bytes(experiment: Experiment, classes: int) -> int:
    """Tensors of the uncompressed detector."""
    return _bytes(_shapes(experiment, classes).state_dict().values())


def teacher_checkpoint_bytes(experiment: Experiment, classes: int) -> int:
    """Checkpoints while the teacher is fitted: one learning rate."""
    options = AlignmentConfig(trainable=experiment.teacher.trainable, learning_rates=(1.0,))
    return checkpoint_bytes(experiment, options, classes)


def checkpoint_bytes(experiment: Experiment, config: AlignmentConfig, classes: int) -> int:
    """Checkpoints of a grid over the uncompressed detector; nothing where nothing trains."""
    student = _shapes(experiment, classes)
    prepare_student(student, config, torch.Generator())
    trained = _bytes(value for value in student.parameters() if value.requires_grad)
    return CHECKPOINTS_AT_ONCE * len(config.learning_rates) * STATES_IN_CHECKPOINT * trained


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes + TENSOR_BYTES for tensor in tensors)


def _shapes(experiment: Experiment, classes: int) -> Detector:
    with torch.device("meta"):
        return Detector(experiment.detector, classes)
