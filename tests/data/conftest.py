"""Small videos, written on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def _write_video(
    path: Path,
    frames: int = 30,
    width: int = 64,
    height: int = 48,
    codec: str = "libx264",
    fps: int | Fraction = 10,
    ticks: Sequence[int] | None = None,
) -> Path:
    """Frame k is grey level 7 k (below 230), its left half 20 levels brighter.

    Args:
        ticks: when each frame is shown, in units of 1 / fps seconds; None: one after the other.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            pixels = np.full((height, width, 3), 7 * index % 230, np.uint8)
            pixels[:, : width // 2] += 20
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[index], 1 / Fraction(fps)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def write_video() -> Callable[..., Path]:
    """write_video(path, frames=30, ...) -> path, with a video in it (`_write_video`)."""
    return _write_video
