"""What a fine-tuning run is told: everything as values, so that it can be sent anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pbd_ray.compression.blocks import Model, from_detector
from pbd_ray.config import (
    AlignmentConfig,
    ConfigError,
    DetectorConfig,
    Experiment,
    Recipe,
    TeacherConfig,
)
from pbd_ray.data.annotations import Annotations, Split
from pbd_ray.data.source import VideoSource
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.videomae import start_on_motion
from pbd_ray.detector.vit_weights import load_backbone

TEACHER_ROUND = 0


@dataclass(frozen=True, eq=False)
class FineTuneJob:
    """One run: a student, what guides it, and one learning rate of the grid."""

    experiment: Experiment
    config: AlignmentConfig
    """The run's own: the teacher is fitted with another than `experiment.alignment`."""
    round: int
    grid_index: int
    learning_rate: float
    student: Model
    teacher: Model | None
    fit: Annotations
    selection: Annotations
    source: VideoSource
    window_batch: int
    guide: DetectorConfig | None = None
    """Architecture of the teacher where it is not the student's (a student with another activation)."""
    standardize: bool = False
    """Begin by setting the final norm to the fit windows (`FineTuning.standardize_features`)."""


def alignment_job(
    recipe: Recipe, split: Split, source: VideoSource, round_number: int, student: Model, teacher: Model
) -> FineTuneJob:
    """The job of a round; the learning rate is set by the grid."""
    drops = recipe.experiment.detector.backbone.depth - len(student.kept_blocks)
    config = recipe.experiment.alignment_after(drops)
    return _job(recipe, split, source, config, round_number, student, teacher)


def teacher_job(recipe: Recipe, split: Split, source: VideoSource, say: Callable[[str], None]) -> FineTuneJob:
    """Fit the uncompressed detector: nothing guides it.

    Args:
        say: gets a line about what became of pretrained weights.

    Raises:
        UserError: `execution.pretrained_weights` is missing or does not fit.
    """
    options = recipe.experiment.teacher
    student = initial_model(recipe, len(split.fit.classes), say)
    job = _job(recipe, split, source, teacher_config(options), TEACHER_ROUND, student, None)
    pretrained = options.start == "pretrained" and recipe.experiment.detector.backbone.final_norm
    return replace(job, standardize=pretrained)


def teacher_config(options: TeacherConfig) -> AlignmentConfig:
    """How the uncompressed detector is fitted, as a grid of one learning rate without a teacher."""
    return AlignmentConfig(
        trainable=options.trainable,
        learning_rates=(options.backbone_lr,),
        optimizer=options.optimizer,
        feature_loss=False,
        prediction_loss=False,
        select_every_epochs=options.select_every_epochs,
    )


def initial_model(recipe: Recipe, num_classes: int, say: Callable[[str], None]) -> Model:
    """The detector before any training: drawn by seed, the backbone from pretrained weights if asked."""
    experiment = recipe.experiment
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        detector = Detector(experiment.detector, num_classes)
    if experiment.teacher.start == "motion":
        start_on_motion(detector.backbone)
    elif experiment.teacher.start == "pretrained":
        path = recipe.execution.pretrained_weights
        if path is None:
            raise ConfigError("execution.pretrained_weights is not set but teacher.start is pretrained")
        say(f"backbone from {load_backbone(detector.backbone, Path(path)).text()}")
    return from_detector(detector)


def _job(
    recipe: Recipe,
    split: Split,
    source: VideoSource,
    config: AlignmentConfig,
    round_number: int,
    student: Model,
    teacher: Model | None,
) -> FineTuneJob:
    return FineTuneJob(
        experiment=recipe.experiment,
        config=config,
        round=round_number,
        grid_index=0,
        learning_rate=config.learning_rates[0] if config.learning_rates else 0.0,
        student=student,
        teacher=teacher,
        fit=split.fit,
        selection=split.selection,
        source=source,
        window_batch=recipe.execution.window_batch,
    )
