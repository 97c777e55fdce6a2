"""Seconds that the parts of scoring a video take, measured on this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from pbd_ray.config import DetectorConfig, load_recipe
from pbd_ray.data.annotations import Video
from pbd_ray.data.video import FrameReader
from pbd_ray.data.windows import inference_windows
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.postprocess import detections_of_video
from pbd_ray.metrics.cost import window_macs

CLASSES = 20
MEASURED_FRAMES = 64
"""Attention stays inside chunks of 16 frames, so embedding and blocks are measured on four chunks and
multiplied up to the window's 48. The head sees whole windows."""
VIDEO_PIXELS = (180, 320)
"""Height and width of THUMOS14's videos."""


@dataclass(frozen=True)
class Costs:
    """CPU seconds of one thread."""

    decode_seconds: float
    """A frame of the file: all are decoded, whatever the stride, and once, whatever the overlap."""
    embed_seconds: float
    """A window, as the next two."""
    block_seconds: float
    head_seconds: float
    """Pooling, head, decoding and suppression."""

    def window_seconds(self, blocks: int, candidates: Sequence[int]) -> float:
        """Fused scoring of one window (`compression/scoring.py`) by a student of `blocks` blocks: a fork for
        every candidate, which runs the blocks after it, beside the undropped student."""
        forwards = blocks + sum(blocks - 1 - candidate for candidate in candidates)
        heads = len(candidates) + 1
        return self.embed_seconds + forwards * self.block_seconds + heads * self.head_seconds


def measured_costs() -> Costs:
    """Of VideoMAE-S on THUMOS14's grid; the best of three, other work on the machine left out."""
    torch.set_num_threads(1)
    config = load_recipe("thumos14_videomae_s").experiment.detector
    grid = config.grid
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    detector = Detector(config, CLASSES, kept_blocks=(0,)).eval()
    pixels = (grid.crop_pixels, grid.crop_pixels)
    frames = torch.randint(0, 256, (1, 3, MEASURED_FRAMES, *pixels), dtype=torch.uint8, generator=generator)
    share = grid.window_frames / MEASURED_FRAMES
    span = grid.window_frames * grid.stride_frames
    video = Video("v", "v.mp4", "test", span / 30, 30.0, span, np.zeros((0, 2)), np.zeros(0, np.int32))
    windows = inference_windows(video, grid)
    assert len(windows) == 1
    mask = torch.ones((1, grid.feature_steps), dtype=torch.bool)
    with torch.inference_mode():
        tokens, embed = _timed(lambda: detector.backbone.embed(frames))
        tokens, block = _timed(lambda: detector.backbone.run_block(0, tokens))
        window = tokens.repeat(round(share), 1, 1)

        def head() -> Any:
            outputs = [(detector.head_output(window, mask, {}), windows)]
            return detections_of_video(outputs, grid, config.postprocess, CLASSES)

        _, whole_head = _timed(head)
    return Costs(_decode_seconds(grid.stride_frames), embed * share, block * share, whole_head)


@cache
def costs_of_depth(measured: Costs, blocks: int) -> Costs:
    """VideoMAE-S (12 blocks) as measured; -L (24) and -g (40, width 1408) by their MACs relative to it."""
    small = load_recipe("thumos14_videomae_s").experiment.detector
    ours, theirs = (window_macs(config, (0,), CLASSES) for config in (_wider(small, blocks), small))
    return replace(
        measured,
        embed_seconds=measured.embed_seconds * ours.patch_embedding / theirs.patch_embedding,
        block_seconds=measured.block_seconds * ours.blocks[0] / theirs.blocks[0],
        head_seconds=measured.head_seconds * ours.head / theirs.head,
    )


def _wider(config: DetectorConfig, blocks: int) -> DetectorConfig:
    dim, mlp_ratio = {12: (384, 4.0), 24: (1024, 4.0), 40: (1408, 48 / 11)}[blocks]
    backbone = config.backbone.model_copy(update={"embed_dim": dim, "mlp_ratio": mlp_ratio})
    return config.model_copy(update={"backbone": backbone})


def _decode_seconds(stride_frames: int, frames: int = 768) -> float:
    """Of one frame of an H.264 file of a moving texture, resized to 160 pixels while decoding."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moving.mp4"
        _write_moving_texture(path, frames)
        wanted = np.arange(0, frames, stride_frames)
        return _timed(lambda: FrameReader(str(path), 160).read(wanted))[1] / frames


def _write_moving_texture(path: Path, frames: int) -> None:
    height, width = VIDEO_PIXELS
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            moved = np.roll(texture, (number // 3, 2 * number), axis=(0, 1))
            picture = av.VideoFrame.from_ndarray(moved, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns, and the CPU seconds of its quickest repeat of three."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        result = run()
        seconds.append(time.process_time() - began)
    return result, min(seconds)
