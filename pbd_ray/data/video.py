"""Frames of video files. The only module that imports decord.

Frame numbers count decoded frames in display order, and frame k is taken to lie at k / fps seconds.

What becomes of odd files (each case is tested on a real file):
- A rotation flag in the container is honoured: frames come upright, width and height are those of the upright
  picture.
- A variable frame rate is not: every frame counts the same. Annotations of such files are only as exact as
  their constant-rate reading. The rate of an MP4 is its frames by its seconds; a Matroska file gives the rate
  that its header names, and one whose length then contradicts the annotation is quarantined.
- A video of one frame is a video: its one frame fills every window.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# torch must be loaded before decord: decord opens every NVIDIA library that pip installed beside torch,
# and libnvblas, loaded first, takes over torch's CPU matrix products and crashes in them.
import torch  # noqa: F401  # isort: skip
import decord
import numpy as np
import numpy.typing as npt

from pbd_ray.config import UserError

decord.logging.set_level(decord.logging.QUIET)  # ffmpeg's own lines would flood a job log

TOLERANCE = 0.05
LONGEST_SECONDS = 1e7
"""Time stamps beyond this are decord's way of saying that the file has none."""
FASTEST_FPS = 1000.0
"""Cameras for slow motion reach it; a file that claims more has a broken header."""


class VideoError(UserError):
    """A video file cannot be used. One line for the user."""


@dataclass(frozen=True)
class VideoProbe:
    """What a file says of itself. `width` and `height` are pixels before any resizing."""

    frames: int
    fps: float
    width: int
    height: int


class FrameReader:
    """An open video whose frames are resized while decoding, the short side to `short_side` pixels.

    It decodes with one thread and belongs to the process that made it: never send it to another one.

    Raises:
        VideoError: missing, empty or undecodable file, no video stream, no frames.
    """

    def __init__(self, path: str, short_side: int) -> None:
        self.path = path
        self.probe = probe_video(path)
        scale = short_side / min(self.probe.height, self.probe.width)
        self._size = int(self.probe.width * scale + 0.5), int(self.probe.height * scale + 0.5)
        with _one_line_errors(path, "its frames cannot be decoded"):
            self._reader = _open(path, *self._size)
            self._batches = self._compact_rows() and self._has_time_stamps()
        self._position = 1  # `_compact_rows` took frame 0

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Frames `indices`, in any order and with repeats, as (T, H, W, 3) RGB.

        An index beyond the end gives the last frame: annotated frame counts may be a little too high.

        Raises:
            VideoError: an index beyond the end by more than `slack`; a damaged file.
        """
        assert len(indices) and indices.min() >= 0
        frames = self.probe.frames
        if indices.max() >= frames + slack(frames):
            raise VideoError(f"{self.path}: frame {indices.max()} was asked for, the file has {frames}")
        inside = np.minimum(indices, frames - 1)
        wanted, inverse = np.unique(inside, return_inverse=True)
        with _one_line_errors(self.path, "its frames cannot be decoded"):
            if self._batches:
                decoded: npt.NDArray[np.uint8] = self._reader.get_batch(wanted).asnumpy()
            else:
                decoded = np.stack([self._step_to(int(index)) for index in wanted])
        return decoded if np.array_equal(wanted, inside) else decoded[inverse]

    def check_frames(self, annotated: int) -> None:
        """Refuse a file that cannot be the annotated one, as `check_frames` of this module."""
        check_frames(self.path, self.probe.frames, annotated)

    def _compact_rows(self) -> bool:
        """Whether decord sees 3 colour channels. It counts the padding of rows as further channels where the
        padded row length is a multiple of the width (48 pixels, for one; which ones depends on the CPU), and
        then `get_batch` fails."""
        return bool(self._reader.next().shape[2] == 3)

    def _has_time_stamps(self) -> bool:
        """Without time stamps (some AVI files) `get_batch` now and then gives a wrong frame near the end when
        it has skipped frames, and not the same one each time: such files are read frame by frame instead."""
        seconds = self._reader.get_frame_timestamp(np.arange(self.probe.frames))[:, 0]
        return bool(np.abs(seconds).max() < LONGEST_SECONDS)

    def _step_to(self, index: int) -> npt.NDArray[np.uint8]:
        """Frame `index` (H, W, 3), reached by decoding every frame before it."""
        if index < self._position:
            self._reader, self._position = _open(self.path, *self._size), 0
        for _ in range(index - self._position):
            self._reader.next()
        frame: npt.NDArray[np.uint8] = self._reader.next().asnumpy()
        self._position = index + 1
        width, height = self._size
        return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def probe_video(path: str) -> VideoProbe:
    """Frames, frame rate and size of a file.

    Raises:
        VideoError: missing, empty or undecodable file, no video stream, no frames.
    """
    with _one_line_errors(path, "not a video, or without a video stream"):
        reader = _open(path)
        height, width = reader.next().shape[:2]
        return VideoProbe(len(reader), float(reader.get_avg_fps()), width, height)


def examine_video(path: str) -> VideoProbe:
    """What `probe_video` finds, of a file whose first, middle and last frame decode.

    Three seeks: cheap enough for every video of a run, and enough to see a copy that was cut off.

    Raises:
        VideoError: as `probe_video`; a frame that does not decode; a frame rate that no camera has.
    """
    probe = probe_video(path)
    if not 0 < probe.fps <= FASTEST_FPS:  # also NaN
        raise VideoError(
            f"{path}: it claims {probe.fps:g} frames a second, not more than 0 and at most {FASTEST_FPS:g}"
        )
    with _one_line_errors(path, "its frames cannot be decoded"):
        reader = _open(path)
        for index in sorted({0, probe.frames // 2, probe.frames - 1}):
            reader[index]
    return probe


def read_frames(path: str, indices: npt.NDArray[np.int64], short_side: int) -> npt.NDArray[np.uint8]:
    """Frames `indices` of a file as (T, H, W, 3) RGB, short side `short_side` pixels; see FrameReader.

    Raises:
        VideoError: the file, or a frame of it, cannot be read.
    """
    return FrameReader(path, short_side).read(indices)


def check_frames(path: str, frames: int, annotated: int) -> None:
    """Refuse a file that cannot be the annotated one: frame numbers would mean other moments.

    Raises:
        VideoError: the file's frame count differs from the annotated one by more than `slack`.
    """
    if abs(annotated - frames) > slack(frames):
        raise VideoError(f"{path}: the file has {frames} frames, its annotation says {annotated}")


def slack(frames: int) -> int:
    """By how many frames an annotation and its file may differ: 5 %, at least 2."""
    return max(2, int(TOLERANCE * frames))


def _open(path: str, width: int = -1, height: int = -1) -> Any:
    file = Path(path)
    if not file.is_file():
        raise VideoError(f"{path}: no such video file")
    if not file.stat().st_size:
        raise VideoError(f"{path}: the video file is empty (0 bytes)")
    return decord.VideoReader(path, width=width, height=height, num_threads=1)


@contextmanager
def _one_line_errors(path: str, problem: str) -> Iterator[None]:
    # RuntimeError: decord cannot open; AssertionError: it counts no frames; StopIteration: there are fewer
    # frames than counted. Messages hold decord's source lines, of no use to the user.
    try:
        yield
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, StopIteration):
        raise VideoError(f"{path}: {problem}; the file may be damaged or incomplete") from None
