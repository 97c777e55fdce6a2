"""Every way in which a video's file can be unusable, and the line that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pbd_ray.data.annotations import AnnotationError, Video
from pbd_ray.data.examine import examine

Write = Callable[..., Path]
DAMAGED = "the file may be damaged or incomplete"


@dataclass(frozen=True)
class Bad:
    """A file `make` writes to a path, the line about it, and what is annotated."""

    make: Callable[[Write, Path], object]
    line: str
    """{decoded}: the frames that another decoder gets out of it, {seconds} of them."""
    name: str = "a.mp4"
    frames: int = 100
    seconds: float = 10.0


def cut(write: Write, path: Path) -> None:
    write(path, 100, 320, 240)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def hole(write: Write, path: Path) -> None:
    """Its index is whole, the middle of its pictures is not."""
    write(path, 100, 320, 240)
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[(start + end) // 2 : end] = bytes(end - (start + end) // 2)
    path.write_bytes(content)


BAD = {
    "missing": Bad(
        lambda write, path: None,
        "{root}: no file for video 'a': tried a.mp4 and [v_]a{{.mp4,.mkv,.avi,.webm}}",
    ),
    "zero bytes": Bad(lambda write, path: path.touch(), "{path}: the video file is empty (0 bytes)"),
    "no container": Bad(
        lambda write, path: path.write_text("not found\n" * 99),
        f"{{path}}: not a video, or without a video stream; {DAMAGED}",
    ),
    "cut off, index at its end": Bad(cut, f"{{path}}: not a video, or without a video stream; {DAMAGED}"),
    "cut off, index at its start": Bad(
        cut, "{path}: the file has {decoded} frames, its annotation says 100", name="a.mkv"
    ),
    "cut off, frames not annotated": Bad(
        cut, "{path}: the file lasts {seconds:g} s, its annotation says 10 s", name="a.mkv", frames=0
    ),
    "hole": Bad(hole, f"{{path}}: its frames cannot be decoded; {DAMAGED}"),
    "absurd rate": Bad(
        lambda write, path: write(path, 100, fps=10**6),
        "{path}: it claims 1e+06 frames a second, not more than 0 and at most 1000",
    ),
    "another video": Bad(
        lambda write, path: write(path, 106), "{path}: the file has 106 frames, its annotation says 100"
    ),
}


def frames_by_pyav(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def video(name: str = "a.mp4", frames: int = 100, seconds: float = 10.0) -> Video:
    nothing = np.zeros((0, 2)), np.zeros(0, np.int32)
    return Video("a", name, "fit", seconds, frames / seconds, frames, *nothing)


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(write_video: Write, tmp_path: Path, kind: str) -> None:
    bad = BAD[kind]
    path = tmp_path / bad.name
    bad.make(write_video, path)
    found = examine(video(bad.name, bad.frames, bad.seconds), str(tmp_path))
    decoded = frames_by_pyav(path) if bad.name == "a.mkv" else 0
    assert found.problem == bad.line.format(path=path, root=tmp_path, decoded=decoded, seconds=decoded / 10)


@pytest.mark.parametrize(("frames", "annotated"), [(1, 1), (1, 3), (100, 100), (100, 99)])
def test_good_files(write_video: Write, tmp_path: Path, frames: int, annotated: int) -> None:
    write_video(tmp_path / "a.mp4", frames)
    as_annotated = video(frames=annotated)
    found = examine(as_annotated, str(tmp_path))
    assert found.problem is None
    assert found.video is as_annotated


def test_what_is_not_annotated_comes_from_the_file(write_video: Write, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 100, fps=20)
    found = examine(video(frames=0, seconds=5.1), str(tmp_path))
    assert (found.video.frames, found.video.fps, found.problem) == (100, 20.0, None)
    assert found.video.duration_seconds == 5.1
    unknown = examine(replace(video(frames=0), duration_seconds=0.0), str(tmp_path))
    assert (unknown.video.frames, unknown.video.duration_seconds, unknown.problem) == (100, 5.0, None)


@pytest.mark.parametrize(
    ("frames", "rate", "expected"),
    [
        (192, 19.2, (192, 19.2)),  # encoded again, as long as annotated: its frames are the times
        (192, 20.0, (200, 20.0)),  # 0.4 s are missing at its end: the annotated times hold
        (199, 20.0, (200, 20.0)),
        (201, 20.0, (200, 20.0)),
        (208, 20.8, (208, 20.8)),
    ],
)
def test_another_rate_or_another_end(
    frames: int, rate: float, expected: tuple[int, float], write_video: Write, tmp_path: Path
) -> None:
    """Annotated: 200 frames, 10 s."""
    write_video(tmp_path / "a.mp4", frames, fps=Fraction(rate).limit_denominator(10))
    found = examine(video(frames=200, seconds=10.0), str(tmp_path))
    assert found.problem is None
    assert (found.video.frames, found.video.fps) == pytest.approx(expected)
    assert found.video.duration_seconds == 10.0


def test_a_file_elsewhere_is_no_accident(write_video: Write, tmp_path: Path) -> None:
    """Not one more bad video: the annotations lead out of the data root."""
    root, elsewhere = tmp_path / "videos", write_video(tmp_path / "other.mp4", 100)
    root.mkdir()
    with pytest.raises(AnnotationError) as error:
        examine(replace(video(), path=str(elsewhere)), str(root))
    assert str(error.value) == f"video 'a': file {elsewhere} is outside of execution.data_root {root}"


def test_a_link_in_the_data_root_is_a_file(write_video: Write, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "videos", write_video(tmp_path / "other.mp4", 100)
    root.mkdir()
    (root / "a.mp4").symlink_to(elsewhere)
    assert examine(video(), str(root)).problem is None
