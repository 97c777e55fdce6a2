"""A recipe for a data set: one that runs as it is, with the reason for what was chosen beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pbd_ray.data.annotations import Annotations
from pbd_ray.data.grid_choice import GridChoice
from pbd_ray.data.subsets import SELECTION, TEST, TRAINING

FEW_VIDEOS = 100
"""With fewer training videos a smaller head and shorter schedules than the shipped recipes have."""


@dataclass(frozen=True)
class Backbone:
    """The transformer of a recipe, and how a teacher of it is begun."""

    name: str
    embed_dim: int
    depth: int
    num_heads: int
    largest_pixels: int
    """Frames are at most so large."""
    start: str
    lr: str


VIDEOMAE_S = Backbone("VideoMAE-S", 384, 12, 6, 160, "random", "1.0e-4")
SMALL = Backbone("a small one, for a first try", 96, 6, 3, 48, "motion", "1.0e-3")


@dataclass(frozen=True)
class _Schedule:
    """What depends on how many training videos there are."""

    channels: int
    selection_fraction: float
    teacher_epochs: int
    teacher_head_lr: str
    epochs: int
    learning_rates: str
    ema_decay: float


_FEW = _Schedule(128, 0.2, 30, "1.0e-3", 2, "[1.0e-5, 3.1623e-5, 1.0e-4]", 0.99)
_MANY = _Schedule(512, 0.1, 60, "1.0e-4", 15, "[1.0e-5, 3.1623e-5, 1.0e-4, 3.1623e-4, 1.0e-3]", 0.999)


def draft_recipe(
    annotations: Annotations,
    choice: GridChoice,
    backbone: Backbone,
    name: str,
    data_root: str,
    annotation_file: str,
) -> str:
    """YAML of a recipe for `annotations`, of a transformer under ActionFormer.

    Args:
        choice: of the training videos.
        name: of the experiment.
        data_root: directory of the videos.
        annotation_file: where the annotations are written.
    """
    training = annotations.subset(TRAINING).videos
    schedule = _FEW if len(training) < FEW_VIDEOS else _MANY
    grid, reasons = choice.grid, choice.reasons
    resize = grid.kind == "resize"
    selection = [video for video in annotations.videos if video.subset == SELECTION]
    share = f"{schedule.selection_fraction} # of the {len(training)} training videos choose rate and epoch"
    chooses = f"selection_subset: {SELECTION}" if selection else f"selection_fraction: {share}"
    ranges = ", ".join(f"[{low:g}, {high:g}]" for low, high in choice.regression_ranges)
    layout = (
        f"feature_steps: {grid.feature_steps} # {reasons['feature_steps']}"
        if resize
        else f"stride_frames: {grid.stride_frames} # {reasons['stride_frames']}\n"
        f"      overlap: {grid.overlap}\n"
        f"      feature_steps: {grid.feature_steps}"
    )
    window_reason = f" # {reasons['window_frames']}" if "window_frames" in reasons else ""
    tious = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95] if resize else [0.3, 0.4, 0.5, 0.6, 0.7]
    return f"""\
# Made from the annotations by jobs/check_data.py; every value is yours to change.
#
#   python jobs/train_teacher.py THIS_FILE --output TEACHER
#   python jobs/compress.py THIS_FILE teacher.source=TEACHER run_dir=RUN
#
# Without teacher.source jobs/compress.py fits one in the run. Start a VideoMAE-S from pretrained weights
# (teacher.start=pretrained pretrained_weights=FILE): from random ones it needs many hours of video.

experiment:
  name: {json.dumps(name, ensure_ascii=False)}
  seed: 0

  data:
    source: files
    fit_subset: {TRAINING}
    {chooses}
    test_subset: {TEST} # read once a committed round, chooses nothing
    min_instance_fraction: {0.01 if resize else 0.0}

  detector:
    grid:
      kind: {grid.kind} # {reasons["kind"]}
      window_frames: {grid.window_frames}{window_reason}
      {layout}
      train_short_side_pixels: {grid.train_short_side_pixels}
      test_short_side_pixels: {grid.test_short_side_pixels}
      crop_pixels: {grid.crop_pixels}
      augmentation: flip # full: crops and colours too, for long schedules
    backbone: # {backbone.name}
      embed_dim: {backbone.embed_dim}
      depth: {backbone.depth}
      num_heads: {backbone.num_heads}
      patch_pixels: 16
      position_table_pixels: 224
      final_norm: false # true: where the pretrained weights are an image ViT's (DINOv2, DeiT)
      drop_path: {0.0 if schedule is _FEW else 0.1}
    head:
      channels: {schedule.channels} # {len(training)} training videos
      num_heads: 4
      levels: {len(choice.regression_ranges)} # {reasons["levels"]}
      regression_ranges: [{ranges}]

  teacher:
    source: train # or the bundle of jobs/train_teacher.py, or an OpenTAD checkpoint
    start: {backbone.start}
    backbone_lr: {backbone.lr}
    trainable: full # head: the backbone stays as it starts; with pretrained weights and few videos
    select_every_epochs: 4
    optimizer:
      epochs: {schedule.teacher_epochs}
      schedule_epochs: {schedule.teacher_epochs}
      warmup_epochs: 2
      head_lr: {schedule.teacher_head_lr}
      batch_size: 2
      ema_decay: {schedule.ema_decay}
      ema_warmup: true

  scoring:
    criterion: map
    map_tiou: 0.5

  alignment:
    trainable: lora
    learning_rates: {schedule.learning_rates}
    optimizer:
      epochs: {schedule.epochs}
      schedule_epochs: {schedule.epochs}
      warmup_epochs: 0.5
      head_lr: 1.0e-4
      batch_size: 2
      ema_decay: {schedule.ema_decay}
      ema_warmup: true

  stopping:
    max_drops: null # depth / 4 = {backbone.depth // 4}

  evaluation:
    tious: {tious}
    headline_tiou: 0.5

execution:
  data_root: {json.dumps(data_root, ensure_ascii=False)}
  annotations: {json.dumps(annotation_file, ensure_ascii=False)}
  device: cpu # with a GPU a worker: device=cuda gpus_per_worker=1, and autocast=float16
  max_workers: 2
  cpus_per_worker: 1
  window_batch: 1
"""
