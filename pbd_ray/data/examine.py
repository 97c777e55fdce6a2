"""A look at a video before anything long runs: can it be used as it is annotated?"""

from __future__ import annotations

from dataclasses import dataclass

from pbd_ray.data.annotations import NoVideoFile, Video, video_file, with_probe
from pbd_ray.data.video import VideoError, VideoProbe, check_frames, examine_video, slack

_NOTICED_SECONDS = 0.2
"""By how much a boundary at the end may be off before the file's own frame rate is taken."""


@dataclass(frozen=True, eq=False)
class Finding:
    """What the look at one video found."""

    video: Video
    """With frames, frame rate and length of its file, where its annotation has none; with the file's frames
    and frame rate where it has the annotated length at another rate."""
    problem: str | None
    """Why it cannot be used, one line that names the file."""
    probe: VideoProbe | None = None
    """What the file says of itself, where it can be used."""


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
                check_seconds(path, probe, video.duration_seconds)
            return Finding(with_probe(video, probe), None, probe)
        check_frames(path, probe.frames, video.frames)
        if _at_another_rate(video, probe):
            return Finding(with_probe(video, probe), None, probe)
    except (NoVideoFile, VideoError) as error:
        return Finding(video, str(error))
    return Finding(video, None, probe)


def _at_another_rate(video: Video, probe: VideoProbe) -> bool:
    """Whether the file is as long as the annotated one, with frames at another rate: encoded again.

    Then its own frames are the times; of a file that lacks a few at its end the annotated ones are.
    """
    annotated_seconds, own_seconds = video.duration_seconds, probe.frames / probe.fps
    apart = abs(probe.frames - video.frames) / probe.fps
    return abs(own_seconds - annotated_seconds) < 0.5 * apart and apart > _NOTICED_SECONDS


def check_seconds(path: str, probe: VideoProbe, annotated_seconds: float) -> None:
    """Refuse a file that is not as long as the annotated one.

    Raises:
        VideoError: the lengths differ by more frames than `slack`.
    """
    if abs(annotated_seconds * probe.fps - probe.frames) > slack(probe.frames):
        seconds = probe.frames / probe.fps
        raise VideoError(f"{path}: the file lasts {seconds:g} s, its annotation says {annotated_seconds:g} s")
