"""What `benchmarks/scoring.py` scores: two detectors with random weights, and videos written for them.

Random weights cost what trained ones do: scores lie near the prior, above the threshold, so that every
window brings its 2000 proposals to suppression.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pbd_ray.compression.blocks import Model, from_detector, to_detector
from pbd_ray.compression.scoring import ScoringJob, score_videos
from pbd_ray.config import (
    BackboneConfig,
    DataConfig,
    DetectorConfig,
    Execution,
    Experiment,
    GridConfig,
    HeadConfig,
    Recipe,
    SyntheticConfig,
)
from pbd_ray.data import synthetic
from pbd_ray.data.annotations import Annotations, Video
from pbd_ray.data.source import VideoSource, inference_batches
from pbd_ray.data.windows import inference_windows
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.postprocess import decode
from pbd_ray.search.slices import race_order

CPU = torch.device("cpu")
ROUND = 1
CLASSES = tuple(f"class {label:02d}" for label in range(20))
IDENTITY_BLOCK, IDENTITY_SCALE = 5, 0.01
"""The block of the VideoMAE-S shape that adds next to nothing to its input."""


@dataclass(frozen=True, eq=False)
class Case:
    """A student and the videos of one scoring round."""

    name: str
    recipe: Recipe
    student: Model
    videos: Annotations
    """The scoring set; all its videos have equally many windows, which fit one batch."""
    naive_videos: int
    """The naive loop runs on so many of them; the others would cost the same again."""

    @property
    def source(self) -> VideoSource:
        """Files without a cache of frames: every read decodes."""
        assert self.recipe.execution.data_root is not None
        return VideoSource(self.recipe.execution.data_root)

    @property
    def paired(self) -> tuple[Video, ...]:
        """What the naive loop runs on: the race's first videos, which every candidate is scored on."""
        order = race_order(self.videos.videos, self.recipe.experiment.seed, ROUND)
        return order[: self.naive_videos]

    @property
    def windows_per_video(self) -> int:
        config = self.recipe.experiment.detector
        (count,) = {len(inference_windows(video, config.grid)) for video in self.videos.videos}
        assert count <= self.recipe.execution.window_batch
        return count

    def job(self, candidates: tuple[int, ...]) -> ScoringJob:
        batch = self.recipe.execution.window_batch
        return ScoringJob(self.recipe.experiment, "map", candidates, ROUND, self.source, batch, CPU)

    def detector(self, model: Model) -> Detector:
        return to_detector(model, self.recipe.experiment.detector, len(CLASSES))


def tiny(root: Path, videos: int = 25) -> Case:
    """The reference's tiny student: 5 blocks of width 48 (6 less a dropped one); 3 windows a video."""
    config = DetectorConfig(
        grid=GridConfig(window_frames=64, feature_steps=64, test_short_side_pixels=64, crop_pixels=64),
        backbone=BackboneConfig(
            embed_dim=48, depth=6, num_heads=3, position_table_pixels=96, drop_path=0.0, unused_norm=True
        ),
        head=HeadConfig(channels=32, drop_path=0.0),
    )
    student = from_detector(_random(config, kept_blocks=(0, 1, 3, 4, 5)))
    return _case("tiny", root, config, student, videos, seconds=25.6, pixels=72, naive_videos=videos)


def videomae_s(root: Path) -> Case:
    """12 blocks of width 384, on short windows of small frames.

    The head is as wide as ActivityNet's. Beside so few frames THUMOS14's of 512 channels takes a quarter of
    the time; of a window of 768 frames it is 1 % of the products. One block adds next to nothing, so there
    is a candidate whose removal hurts least by far.
    """
    config = DetectorConfig(
        grid=GridConfig(window_frames=32, feature_steps=64, test_short_side_pixels=96, crop_pixels=96),
        head=HeadConfig(channels=256),
    )
    detector = _random(config, kept_blocks=tuple(range(12)))
    block = detector.backbone.get_submodule(f"blocks.{IDENTITY_BLOCK}")
    with torch.no_grad():
        for name in ("attn.proj", "mlp.fc2"):
            for parameter in block.get_submodule(name).parameters():
                parameter.mul_(IDENTITY_SCALE)
    student = from_detector(detector)
    return _case("VideoMAE-S shape", root, config, student, 48, seconds=6.4, pixels=120, naive_videos=8)


def with_own_truth(case: Case, instances_per_video: int = 10) -> Case:
    """The case with the undropped student's best detections of every class as ground truth.

    Removals that change what it detects are then clear losers.
    """
    student = case.detector(case.student)
    found = score_videos(case.job(()), student, None, case.videos.videos)
    found = found.filter(pc.greater(pc.subtract(found["end"], found["start"]), 0.01))
    best: list[pa.Table] = []
    for label in range(len(CLASSES)):
        ranked = found.filter(pc.equal(found["label"], label)).sort_by([("score", "descending")])
        best.append(ranked.slice(0, instances_per_video * len(case.videos.videos)))
    truth = pa.concat_tables(best)

    def annotated(video: Video) -> Video:
        mine = truth.filter(pc.equal(truth["video"], video.id))
        segments = np.stack([mine["start"].to_numpy(), mine["end"].to_numpy()], axis=1)
        return replace(video, segments_seconds=segments, labels=mine["label"].to_numpy())

    videos = tuple(annotated(video) for video in case.videos.videos)
    return replace(case, videos=replace(case.videos, videos=videos))


def check_proposals(case: Case) -> None:
    """Every window must bring as many proposals as it may, or suppression would look too cheap."""
    config = case.recipe.experiment.detector
    detector, window_batch = case.detector(case.student), case.recipe.execution.window_batch
    with torch.inference_mode():
        for batch in inference_batches(case.source, case.paired[0], config.grid, window_batch):
            output = detector(batch.frames, batch.mask)
            for window in decode(output, batch.windows, config.postprocess):
                assert len(window.scores) == config.postprocess.pre_nms_top, len(window.scores)


def _random(config: DetectorConfig, kept_blocks: tuple[int, ...]) -> Detector:
    torch.manual_seed(0)
    return Detector(config, len(CLASSES), kept_blocks)


def _case(
    name: str,
    root: Path,
    config: DetectorConfig,
    student: Model,
    count: int,
    seconds: float,
    pixels: int,
    naive_videos: int,
) -> Case:
    """Videos of one length, 20 frames a second, with one instance of every class at a random place."""
    drawn = SyntheticConfig(
        fit_videos=count,
        selection_videos=1,
        test_videos=1,
        short_side_pixels=pixels,
        min_duration_seconds=seconds,
        max_duration_seconds=seconds,
    )
    directory = root / name.replace(" ", "_")
    synthetic.generate(directory, drawn, processes=2)
    rng = np.random.default_rng(0)

    def annotated(video: Video) -> Video:
        start = rng.uniform(0, seconds - 2, len(CLASSES))
        segments = np.stack([start, start + rng.uniform(0.5, 2, len(CLASSES))], axis=1)
        return replace(video, segments_seconds=segments, labels=np.arange(len(CLASSES), dtype=np.int32))

    fit = synthetic.annotate(drawn).subset("fit")
    recipe = Recipe(
        experiment=Experiment(name=directory.name, data=DataConfig(source="files"), detector=config),
        # Two thirds of a CPU, so that one worker and two can stand side by side on two cores.
        execution=Execution(data_root=str(directory), cache_gigabytes=0, max_workers=1, cpus_per_worker=0.66),
    )
    videos = Annotations(CLASSES, tuple(annotated(video) for video in fit.videos))
    return Case(name, recipe, student, videos, naive_videos)
