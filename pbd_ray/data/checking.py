"""Written annotations held against each other and against the files of the videos: what can be used, and what
is wrong with the rest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from pbd_ray.data.annotation_forms import Problem, Written, WrittenInstance, WrittenVideo
from pbd_ray.data.annotations import Annotations, Video
from pbd_ray.data.examine import Finding, check_seconds
from pbd_ray.data.json_file import AnnotationError
from pbd_ray.data.subsets import SELECTION, TEST, TRAINING
from pbd_ray.data.video import VideoError

ROUNDING_SECONDS = 0.1
"""By so much an instance may reach out of its video without a word: THUMOS14 is in tenths of a second."""


@dataclass(frozen=True, eq=False)
class Checked:
    """What of the data can be used."""

    annotations: Annotations
    """Videos by subset and id, with the frames and the length of their files; instances by time."""
    problems: tuple[Problem, ...]
    short_side_pixels: int
    """Of the median training video."""


def unchecked_videos(written: Written, subsets: Mapping[str, str], files: Sequence[str]) -> tuple[Video, ...]:
    """The videos that have a subset, each with its file, for a look at the files.

    Args:
        files: all video files, relative to the data root. A file is known by its path, with or without
            suffix; where a name without folder is written, by its name in whatever folder, if no other one is
            called so, with or without ActivityNet's `v_`.
    """
    known, by_path, by_stem = set(files), defaultdict(list), defaultdict(list)
    for file in files:
        path = PurePosixPath(file)
        by_path[path.with_suffix("").as_posix()].append(file)
        by_stem[path.stem].append(file)

    def located(video: WrittenVideo) -> str:
        name = video.file or f"{video.id}.mp4"
        if PurePosixPath(name).is_absolute():  # of the place where it was annotated
            name = PurePosixPath(name).name
        if name in known:
            return name
        path = PurePosixPath(name).with_suffix("")
        called = by_path[path.as_posix()]
        if not called and path.name == path.as_posix():
            called = by_stem[path.name] or by_stem[f"v_{path.name}"]
        return called[0] if len(called) == 1 else name

    nothing = np.zeros((0, 2)), np.zeros(0, np.int32)
    return tuple(
        Video(
            video.id, located(video), subsets[video.id], video.duration_seconds, 0.0, video.frames, *nothing
        )
        for video in written.videos
        if video.id in subsets
    )


def check_data(written: Written, findings: Iterable[Finding], path: str) -> Checked:
    """Keep what can be used, and say of everything else why it cannot.

    Args:
        findings: of `unchecked_videos`, in any order.
        path: of the annotations.

    Raises:
        AnnotationError: nothing is left to train on, or to test on.
    """
    problems = list(written.problems)
    by_id = {video.id: video for video in written.videos}
    kept: dict[str, list[WrittenInstance]] = {}
    of_file: dict[str, str] = {}
    usable: list[Finding] = []
    short_sides = []
    for finding in sorted(findings, key=lambda finding: (finding.video.subset, finding.video.id)):
        video = by_id[finding.video.id]
        reason = finding.problem or _other_length(finding, video)
        if reason is not None:
            problems.append(Problem("video cannot be used", reason))
            continue
        first = of_file.setdefault(finding.video.path, video.id)
        if first != video.id:
            line = f"{finding.video.path}: the file of video {first!r} is that of {video.id!r} too, left out"
            problems.append(Problem("video there twice", line))
            continue
        assert finding.probe is not None
        if finding.video.subset == TRAINING:
            short_sides.append(min(finding.probe.width, finding.probe.height))
        kept[video.id] = list(_kept(video, finding.probe.frames / finding.probe.fps, problems))
        usable.append(finding)
    classes = tuple(sorted({instance.label for instances in kept.values() for instance in instances}))
    videos = tuple(_video(finding, kept[finding.video.id], classes) for finding in usable)
    annotations = Annotations(classes, videos)
    _require_parts(annotations, problems, path)
    problems += _class_problems(annotations, path)
    return Checked(annotations, tuple(problems), int(np.median(short_sides)))


def _other_length(finding: Finding, video: WrittenVideo) -> str | None:
    """Where frames are annotated the look at the file has compared them, and not the seconds."""
    if finding.probe is None or not video.duration_seconds:
        return None
    try:
        check_seconds(finding.video.path, finding.probe, video.duration_seconds)
    except VideoError as error:
        return str(error)
    return None


def _video(finding: Finding, instances: Sequence[WrittenInstance], classes: Sequence[str]) -> Video:
    assert finding.probe is not None
    frames, fps = finding.probe.frames, finding.probe.fps
    segments = [(instance.start_seconds, instance.end_seconds) for instance in instances]
    labels = [classes.index(instance.label) for instance in instances]
    return Video(
        finding.video.id,
        finding.video.path,
        finding.video.subset,
        frames / fps,
        fps,
        frames,
        np.array(segments, np.float64).reshape(-1, 2),
        np.array(labels, np.int32),
    )


def _kept(video: WrittenVideo, seconds: float, problems: list[Problem]) -> Iterator[WrittenInstance]:
    """Instances by start, cut to the video; of several equal ones the first."""

    def tell(kind: str, instance: WrittenInstance, what: str) -> None:
        problems.append(Problem(kind, str(instance.node.error(what))))

    seen: set[tuple[str, float, float]] = set()
    ends: dict[str, float] = {}
    for instance in sorted(video.instances, key=lambda one: (one.start_seconds, one.end_seconds, one.label)):
        label, start, end = instance.label, instance.start_seconds, instance.end_seconds
        first, last = max(start, 0.0), min(end, seconds)
        if start == end:
            tell("zero length", instance, "zero length, left out")
        elif first >= last:
            tell("outside of its video", instance, f"outside of the video of {seconds:g} s, left out")
        elif (label, start, end) in seen:
            tell("duplicate", instance, f"a second {label!r} at the same time, left out")
        else:
            if max(first - start, end - last) > ROUNDING_SECONDS:
                tell("reaches out of its video", instance, f"reaches out of the video of {seconds:g} s, cut")
            if first < ends.get(label, 0.0):
                tell("overlap", instance, f"overlaps another {label!r} that ends at {ends[label]:g}, kept")
            seen.add((label, start, end))
            ends[label] = max(last, ends.get(label, 0.0))
            yield WrittenInstance(instance.node, label, first, last)


def _require_parts(annotations: Annotations, problems: Sequence[Problem], path: str) -> None:
    videos = Counter(video.subset for video in annotations.videos if len(video.labels))
    first = f"; the first of {len(problems)} problems: {problems[0].line}" if problems else ""
    for name, purpose in ((TRAINING, "train on"), (TEST, "test on")):
        if not videos[name]:
            raise AnnotationError(f"{path}: no usable instance to {purpose}{first}")
    if videos[TRAINING] + videos[SELECTION] < 2:
        raise AnnotationError(
            f"{path}: one usable video beside the test videos, none is left to choose by{first}"
        )


def _class_problems(annotations: Annotations, path: str) -> Iterator[Problem]:
    counts = {
        name: Counter(label for video in annotations.subset(name).videos for label in video.labels.tolist())
        for name in sorted({video.subset for video in annotations.videos})
    }
    for label, name in enumerate(annotations.classes):
        if sum(count[label] for count in counts.values()) == 1:
            yield Problem("label with one instance", f"{path}: label {name!r}: one instance only")
        for subset, count in counts.items():
            if not count[label]:
                yield Problem("class not in a subset", f"{path}: label {name!r}: no instance in {subset}")
