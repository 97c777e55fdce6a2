"""Annotated videos: reading, checking, splitting; and detections as JSON.

Files are in ActivityNet form: `{"database": {id: {"subset", "duration", "annotations": [{"label",
"segment": [start, end]}], ...}}}` with optional `fps`, `frame` (or `frames`) and `file`. OpenTAD's THUMOS14
files are of this form too. Times are seconds everywhere in this module.
"""

from __future__ import annotations

import logging
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pbd_ray.config import DataConfig
from pbd_ray.data.json_file import LARGEST, AnnotationError, JsonNode

if TYPE_CHECKING:
    from pbd_ray.data.video import VideoProbe
    from pbd_ray.data.video_classes import VideoClasses

log = logging.getLogger(__name__)

GROUND_TRUTH_SCHEMA = pa.schema(
    [("video", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("label", pa.int32())]
)
DETECTION_SCHEMA = GROUND_TRUTH_SCHEMA.append(pa.field("score", pa.float64()))

AMBIGUOUS = "Ambiguous"
"""THUMOS14 marks with it what even its annotators could not tell; never an instance (as OpenTAD)."""
AGNOSTIC_CLASSES = ("action",)
VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".webm")


class NoVideoFile(AnnotationError):
    """An annotated video has no file."""


@dataclass(frozen=True, eq=False)
class Video:
    """One annotated video. `segments_seconds` (n, 2) and `labels` (n,) are read-only."""

    id: str
    path: str
    """File name relative to the data root, or absolute and inside it."""
    subset: str
    duration_seconds: float
    """0.0: unknown until `with_probe`."""
    fps: float
    """As written, else frames / duration; 0.0 with `frames` 0: unknown until `with_probe`."""
    frames: int
    """Frames of the file."""
    segments_seconds: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Annotations:
    """Videos, and the class names their labels index."""

    classes: tuple[str, ...]
    videos: tuple[Video, ...]
    video_classes: VideoClasses | None = None
    """Class-agnostic only: where mAP takes names from; None scores them without any."""

    def subset(self, name: str) -> Annotations:
        """Videos whose subset is `name`, in file order; may be empty."""
        return replace(self, videos=tuple(video for video in self.videos if video.subset == name))

    def select(self, ids: Iterable[str]) -> Annotations:
        """The videos `ids` name, in the order of `ids`.

        Raises:
            AnnotationError: an id is not here.
        """
        by_id = {video.id: video for video in self.videos}
        chosen = []
        for id_ in ids:
            if id_ not in by_id:
                raise AnnotationError(f"video {id_!r} is not among the {len(by_id)} annotated videos")
            chosen.append(by_id[id_])
        return replace(self, videos=tuple(chosen))

    def ground_truth(self) -> pa.Table:
        """All instances as a table of GROUND_TRUTH_SCHEMA, in video order (seconds)."""
        segments = np.concatenate([np.zeros((0, 2)), *(video.segments_seconds for video in self.videos)])
        labels = np.concatenate([np.zeros(0, np.int32), *(video.labels for video in self.videos)])
        names = [video.id for video in self.videos for _ in video.labels]
        columns = [pa.array(names, pa.string()), segments[:, 0], segments[:, 1], labels]
        return pa.table(columns, schema=GROUND_TRUTH_SCHEMA)


@dataclass(frozen=True, eq=False)
class Split:
    """Who trains and scores, who chooses learning rate and epoch, who is read once (design, section 2)."""

    fit: Annotations
    selection: Annotations
    test: Annotations

    @property
    def parts(self) -> dict[str, Annotations]:
        """The three parts by name."""
        return {"fit": self.fit, "selection": self.selection, "test": self.test}

    def map(self, change: Callable[[Video], Video]) -> Split:
        """The split with every video changed."""
        changed = {
            name: replace(part, videos=tuple(change(video) for video in part.videos))
            for name, part in self.parts.items()
        }
        return Split(**changed)

    def everything(self) -> Annotations:
        """All videos of the three parts."""
        return replace(self.fit, videos=self.fit.videos + self.selection.videos + self.test.videos)


def load_annotations(
    path: str | Path, classes: Sequence[str] | None = None, class_agnostic: bool = False
) -> Annotations:
    """Read and check an ActivityNet-form file.

    Instances of zero length or outside their video stay as they are, as the official evaluators count them
    (THUMOS14 has 30 that lie wholly outside their video).

    Args:
        classes: names in label order; None: every label of the file, sorted.
        class_agnostic: every label becomes 0 and the classes ('action',); `classes` is not looked at.

    Raises:
        AnnotationError: naming file, field and value.
    """
    database = JsonNode.read(path).member("database")
    entries = list(database.items())
    if not entries:
        raise database.error("expected at least one video")
    names = AGNOSTIC_CLASSES if class_agnostic else _class_names(path, classes, entries)
    label_of = None if class_agnostic else {name: label for label, name in enumerate(names)}
    counts: Counter[str] = Counter()
    videos = tuple(_video(id_, entry, label_of, counts) for id_, entry in entries)
    _warn(path, counts)
    return Annotations(names, videos)


def with_probe(video: Video, probe: VideoProbe) -> Video:
    """The video with the frames and frame rate its file has, whatever the annotations said; with its
    length too, where they say none."""
    seconds = video.duration_seconds or probe.frames / probe.fps
    return replace(video, frames=probe.frames, fps=probe.fps, duration_seconds=seconds)


def _is_inside(path: Path, folder: Path) -> bool:
    """By name, or with the links followed that lead to the folder itself."""
    parent = path.absolute().parent
    return parent.is_relative_to(folder.absolute()) or parent.resolve().is_relative_to(folder.resolve())


def video_file(video: Video, data_root: str) -> str:
    """Where the video's file is: at its path, else its id or `v_` + id (as ActivityNet) with a known suffix.

    Raises:
        NoVideoFile: there is none.
        AnnotationError: its path lies outside the data root. Links inside it may lead anywhere: whoever made
            the folder made them, the annotations cannot.
    """
    bare = PurePosixPath(video.id)
    stems = (bare, bare.with_name(f"v_{bare.name}"))
    for name in (video.path, *(f"{stem}{suffix}" for stem in stems for suffix in VIDEO_SUFFIXES)):
        candidate = Path(data_root, name)
        if candidate.is_file():
            if not _is_inside(candidate, Path(data_root)):
                raise AnnotationError(
                    f"video {video.id!r}: file {name} is outside of execution.data_root {data_root}"
                )
            return str(candidate)
    raise NoVideoFile(
        f"{data_root}: no file for video {video.id!r}: tried {video.path} and "
        f"[v_]{video.id}{{{','.join(VIDEO_SUFFIXES)}}}"
    )


def annotations_to_json(annotations: Annotations, version: str) -> dict[str, Any]:
    """ActivityNet's form, as `load_annotations` reads it."""
    database = {
        video.id: {
            "subset": video.subset,
            "duration": video.duration_seconds,
            "fps": video.fps,
            "frame": video.frames,
            "file": video.path,
            "annotations": [
                {"segment": segment, "label": annotations.classes[label]}
                for segment, label in zip(video.segments_seconds.tolist(), video.labels.tolist(), strict=True)
            ],
        }
        for video in annotations.videos
    }
    return {"version": version, "database": database}


def split(
    annotations: Annotations, data_config: DataConfig, seed: int, paper_protocol: bool = False
) -> Split:
    """Fit, selection and test videos as the recipe says, each in file order.

    Which videos a `selection_fraction` draws depends on the fit ids and the seed alone.

    Args:
        seed: of the experiment; `split_seed` goes before it.
        paper_protocol: all videos of `fit_subset` fit, and the test videos select, as in the paper's release:
            a leak, offered under its name only.

    Raises:
        AnnotationError: a part is empty, or two parts would share videos.
    """
    subsets = {
        "fit_subset": data_config.fit_subset,
        "selection_subset": data_config.selection_subset,
        "test_subset": data_config.test_subset,
    }
    taken: dict[str, str] = {}
    for key, subset in subsets.items():
        if subset is None:
            continue
        if subset in taken:
            raise AnnotationError(
                f"data.{key}: {subset!r} is data.{taken[subset]} too; parts share no videos"
            )
        taken[subset] = key
    fit = annotations.subset(data_config.fit_subset)
    test = annotations.subset(data_config.test_subset)
    blocked = set(data_config.blocked_videos)
    test = test.select(video.id for video in test.videos if video.id not in blocked)
    if paper_protocol:
        selection = test
    elif data_config.selection_subset is None:
        ids = sorted(video.id for video in fit.videos)
        size = min(len(ids), max(1, round(data_config.selection_fraction * len(ids))))
        rng = np.random.default_rng(seed if data_config.split_seed is None else data_config.split_seed)
        drawn = {ids[index] for index in rng.permutation(len(ids))[:size]}
        selection = fit.select(video.id for video in fit.videos if video.id in drawn)
        fit = fit.select(video.id for video in fit.videos if video.id not in drawn)
    else:
        selection = annotations.subset(data_config.selection_subset)
    parts = Split(fit, selection, test)
    for name, part in parts.parts.items():
        if not part.videos:
            counted = Counter(video.subset for video in annotations.videos)
            known = ", ".join(f"{key!r} ({count})" for key, count in sorted(counted.items()))
            asked = ", ".join(f"{key} {value!r}" for key, value in subsets.items() if value is not None)
            raise AnnotationError(f"no {name} videos: data.{asked}; the annotations hold the subsets {known}")
    return parts


@dataclass(frozen=True, eq=False)
class DetectionFile:
    """DETECTION_SCHEMA rows in file order, and how many detections were left out."""

    table: pa.Table
    unknown_videos: int
    unknown_labels: int
    """In videos that are known."""


def read_detections(
    path: str | Path, classes: Sequence[str], videos: Collection[str] | None = None
) -> DetectionFile:
    """Read `{"results": {video: [{"label", "segment", "score"}]}}`.

    Detections whose label is not in `classes`, or whose video is not in `videos` (None: all are known), are
    left out and counted in one logged warning.

    Raises:
        AnnotationError: naming file, field and value.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    known = None if videos is None else set(videos)
    unknown_videos = unknown_labels = 0
    rows: list[tuple[str, float, float, int, float]] = []
    for id_, entry in JsonNode.read(path).member("results").items():
        if not id_.isprintable():  # a lone surrogate could not even be stored in a table
            raise entry.error("expected a printable video id")
        for node in entry.elements():
            start, end = node.member("segment").segment()
            score = node.member("score").number()
            label = label_of.get(node.member("label").text())
            if known is not None and id_ not in known:
                unknown_videos += 1
            elif label is None:
                unknown_labels += 1
            else:
                rows.append((id_, start, end, label, score))
    counts = {
        "detections of unknown labels left out": unknown_labels,
        "detections of unknown videos left out": unknown_videos,
    }
    _warn(path, Counter(counts))
    columns = list(zip(*rows, strict=True)) or [()] * len(DETECTION_SCHEMA)
    table = pa.table([list(column) for column in columns], schema=DETECTION_SCHEMA)
    return DetectionFile(table, unknown_videos, unknown_labels)


def detections_to_json(table: pa.Table, classes: Sequence[str]) -> dict[str, Any]:
    """ActivityNet's `results` form of a DETECTION_SCHEMA table; numbers are not rounded, order is kept."""
    results: dict[str, list[dict[str, Any]]] = {}
    columns = [table.column(name).to_pylist() for name in DETECTION_SCHEMA.names]
    for video, start, end, label, score in zip(*columns, strict=True):
        assert 0 <= label < len(classes), f"label {label} of {len(classes)} classes"
        item = {"label": classes[label], "segment": [start, end], "score": score}
        results.setdefault(video, []).append(item)
    return {"version": "pbd_ray 1", "results": results, "external_data": {}}


def _class_names(
    path: str | Path, classes: Sequence[str] | None, entries: Sequence[tuple[str, JsonNode]]
) -> tuple[str, ...]:
    if classes is not None:
        if not classes or len(set(classes)) != len(classes):
            raise AnnotationError(f"classes: expected distinct names, got {reprlib.repr(list(classes))}")
        return tuple(classes)
    found = {
        instance.member("label").text()
        for _, entry in entries
        for instance in entry.member("annotations").elements()
    }
    if not found - {AMBIGUOUS}:
        raise AnnotationError(f"{path}: no instance has a label, so the classes must be given")
    return tuple(sorted(found - {AMBIGUOUS}))


def _video(id_: str, entry: JsonNode, label_of: dict[str, int] | None, counts: Counter[str]) -> Video:
    entry.check_inside_root(id_)
    duration = entry.member("duration").positive()
    frames, fps = _frames_and_fps(entry, duration, counts)
    segments: list[tuple[float, float]] = []
    labels: list[int] = []
    for instance in entry.member("annotations").elements():
        label_node = instance.member("label")
        label, (start, end) = label_node.text(), instance.member("segment").segment()
        if label == AMBIGUOUS:
            continue
        if label_of is not None and label not in label_of:
            raise label_node.error("expected one of the classes")
        segments.append((start, end))
        labels.append(0 if label_of is None else label_of[label])
    segment_array = np.array(segments, np.float64).reshape(-1, 2)
    label_array = np.array(labels, np.int32)
    # Read-only, so that nothing downstream can change the ground truth (a fault of the release).
    segment_array.flags.writeable = label_array.flags.writeable = False
    file = entry.member("file", required=False)
    path = f"{id_}.mp4" if file is None else file.text()
    if file is not None and not PurePosixPath(path).is_absolute():
        file.check_inside_root(path)
    subset = entry.member("subset").text()
    return Video(id_, path, subset, duration, fps, frames, segment_array, label_array)


def _frames_and_fps(entry: JsonNode, duration: float, counts: Counter[str]) -> tuple[int, float]:
    frames_node = entry.member("frame", required=False) or entry.member("frames", required=False)
    fps_node = entry.member("fps", required=False)
    fps = 0.0 if fps_node is None else fps_node.positive()
    if frames_node is None:
        frames = max(1, round(duration * fps)) if fps else 0
        if frames > LARGEST and fps_node is not None:
            raise fps_node.error(f"{duration} seconds are too many frames at this rate")
        return frames, fps
    frames = int(frames_node.positive())
    if frames != frames_node.value:
        raise frames_node.error("expected a whole number of frames")
    if fps and not 0.95 < fps * duration / frames < 1.05:
        counts["videos whose fps differs from frame / duration by over 5 %"] += 1
    return frames, fps or frames / duration


def _warn(path: str | Path, counts: Counter[str]) -> None:
    found = [f"{count} {what}" for what, count in sorted(counts.items()) if count]
    if found:
        log.warning("%s: %s", path, "; ".join(found))
