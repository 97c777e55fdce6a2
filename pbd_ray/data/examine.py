"""A look at a video before anything long runs: can it be used as it is annotated?"""

from __future__ import annotations

from dataclasses import dataclass

from pbd_ray.data.annotations import NoVideoFile, Video, video_file, with_probe
from pbd_ray.data.video import VideoError, VideoProbe, check_frames, examine_video, slack


@dataclass(frozen=True, eq=False)
class Finding:
    """What the look at one video found."""

    video: Video
    """With frames, frame rate and length of its file, where its annotation has none."""
    problem: str | None
    """Why it cannot be used, one line that names the file."""


def examine(video: Video, data_root: str) -> Finding:
    """Open a video's file, decode three frames of it, and compare it with its annotation.

    Raises:
        AnnotationError: the file lies outside the data root: that is no accident of one file.
    """
    try:
        path = video_file(video, data_root)
        probe = examine_video(path)
        if not video.frames:
            if video.duration_seconds:
                _check_seconds(path, probe, video.duration_seconds)
            return Finding(with_probe(video, probe), None)
        check_frames(path, probe.frames, video.frames)
    except (NoVideoFile, VideoError) as error:
        return Finding(video, str(error))
    return Finding(video, None)


def _check_seconds(path: str, probe: VideoProbe, annotated_seconds: float) -> None:
    """Refuse a file of another length than the annotated one, where no frames are annotated."""
    if abs(annotated_seconds * probe.fps - probe.frames) > slack(probe.frames):
        seconds = probe.frames / probe.fps
        raise VideoError(f"{path}: the file lasts {seconds:g} s, its annotation says {annotated_seconds:g} s")
