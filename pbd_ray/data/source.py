"""Where a recipe's videos and annotations come from: the user's files, or the embedded data set."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pbd_ray.config import ConfigError, GridConfig, Recipe
from pbd_ray.data import synthetic
from pbd_ray.data.annotations import Annotations, Split, Video, load_annotations, split
from pbd_ray.data.cache import FrameCache
from pbd_ray.data.dataset import WindowBatch, load_inference_batches, load_training_batch
from pbd_ray.data.json_file import AnnotationError
from pbd_ray.data.video_classes import VideoClasses, read_probabilities


@dataclass(frozen=True)
class VideoSource:
    """Where this node reads videos: their directory, and the cache of decoded frames."""

    data_root: str
    cache: FrameCache | None = None


def local_source(recipe: Recipe, progress: Callable[[int, int], None] | None = None) -> VideoSource:
    """The videos as this node sees them. The embedded data set is generated where it is missing, so
    every node makes its own, bit for bit the same.

    Raises:
        ConfigError: `execution.data_root` is not set, or is not a directory here.
    """
    generated, cache = recipe.experiment.data.synthetic, frame_cache(recipe)
    if generated is not None:
        return VideoSource(str(synthetic.ensure(generated, _cache_dir(recipe), progress, processes=2)), cache)
    root = recipe.execution.data_root
    if root is None:
        raise ConfigError("execution.data_root is not set: name the directory of the videos")
    if not Path(root).is_dir():
        raise ConfigError(f"execution.data_root {root} is not a directory on this node")
    return VideoSource(root, cache)


def frame_cache(recipe: Recipe) -> FrameCache | None:
    """This node's cache of decoded frames; None where the recipe gives it no room."""
    budget = int(recipe.execution.cache_gigabytes * 1e9)
    return FrameCache(_cache_dir(recipe) / "frames", budget) if budget else None


def _cache_dir(recipe: Recipe) -> Path:
    return Path(recipe.execution.cache_dir or Path(tempfile.gettempdir(), "pbd_ray"))


def load_split(recipe: Recipe, say: Callable[[str], None]) -> Split:
    """Fit, selection and test videos of a recipe; no video file is touched.

    Args:
        say: gets a line where mAP will not be of named classes.

    Raises:
        ConfigError: `execution.annotations` is not set, or an external classifier has nothing to name.
        AnnotationError: a file, or the split it is asked for, is wrong.
    """
    experiment = recipe.experiment
    data, seed, paper = experiment.data, experiment.seed, experiment.paper_protocol
    if recipe.execution.external_classifier is not None and not data.class_agnostic:
        raise ConfigError("execution.external_classifier is set but data.class_agnostic is false")
    if data.synthetic is not None:
        return split(synthetic.annotate(data.synthetic), data, seed, paper)
    if recipe.execution.annotations is None:
        raise ConfigError("execution.annotations is not set: name the annotation file")
    # As the official evaluators count: THUMOS14 has instances that lie outside their video.
    annotations = load_annotations(recipe.execution.annotations, data.classes, data.class_agnostic)
    parts = split(annotations, data, seed, paper)
    return _named(recipe, parts, say) if data.class_agnostic else parts


def _named(recipe: Recipe, parts: Split, say: Callable[[str], None]) -> Split:
    """Class-agnostic parts with what the external classifier says of their videos.

    Without a classifier, and where it lacks videos of a part that it need not know (fit and selection),
    class-agnostic AP takes the place of mAP.
    """
    path, top = (
        recipe.execution.external_classifier,
        recipe.experiment.detector.postprocess.external_top_classes,
    )
    if path is None or top == 0:
        what = "external_classifier is not set" if path is None else "external_top_classes is 0"
        say(f"{what}: detections stay without a class, and every mAP is class-agnostic AP")
        return parts
    assert recipe.execution.annotations is not None
    published = load_annotations(recipe.execution.annotations, recipe.experiment.data.classes)
    ids = [video.id for video in parts.everything().videos]
    probabilities = read_probabilities(path, published.classes, ids)

    def named(name: str, part: Annotations) -> Annotations:
        lacking = [video.id for video in part.videos if video.id not in probabilities]
        if not lacking:
            mine = published.select(video.id for video in part.videos)
            return replace(part, video_classes=VideoClasses(mine, probabilities, top))
        what = f"{len(lacking)} of {len(part.videos)} {name} videos, {lacking[0]!r} first"
        if name == "test":
            raise AnnotationError(f"{path}: results: lacks {what}")
        say(f"{path} lacks {what}: class-agnostic AP scores them")
        return part

    return Split(
        fit=named("fit", parts.fit),
        selection=named("selection", parts.selection),
        test=named("test", parts.test),
    )


def inference_batches(
    source: VideoSource, video: Video, grid: GridConfig, window_batch: int
) -> Iterator[WindowBatch]:
    """`dataset.load_inference_batches` from this source."""
    return load_inference_batches(video, source.data_root, grid, window_batch, source.cache)


def training_batch(
    source: VideoSource,
    videos: Sequence[Video],
    grid: GridConfig,
    seed_key: tuple[int, ...],
    min_instance_fraction: float,
) -> WindowBatch:
    """`dataset.load_training_batch` from this source."""
    return load_training_batch(videos, source.data_root, grid, seed_key, min_instance_fraction, source.cache)
