"""From videos to batches of windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import torch

from pbd_ray.config import GridConfig
from pbd_ray.data.annotations import Video, video_file, with_probe
from pbd_ray.data.augment import inference_clip, training_clip
from pbd_ray.data.cache import CachedFrames, FrameCache
from pbd_ray.data.video import FrameReader
from pbd_ray.data.windows import Window, grid_frames, inference_windows, training_window


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """B windows as the detector takes them."""

    frames: torch.Tensor
    """uint8 (B, 3, T, S, S), RGB."""
    mask: torch.Tensor
    """bool (B, feature_steps): True where the feature grid holds video."""
    segments: tuple[torch.Tensor, ...]
    """Per window float32 (n, 2), feature-grid units; empty at inference."""
    labels: tuple[torch.Tensor, ...]
    """Per window int64 (n,)."""
    windows: tuple[Window, ...]

    def pinned(self) -> WindowBatch:
        """The batch with its frames in page-locked memory, from where they get to a GPU beside compute."""
        return replace(self, frames=self.frames.pin_memory())

    def to(self, device: torch.device) -> WindowBatch:
        """The batch with its tensors on `device`. Pinned frames are still on their way to a GPU when it
        returns: what is asked of the GPU later waits for them."""
        return replace(
            self,
            frames=self.frames.to(device, non_blocking=device.type == "cuda"),
            mask=self.mask.to(device),
            segments=tuple(segments.to(device) for segments in self.segments),
            labels=tuple(labels.to(device) for labels in self.labels),
        )

    def split(self, parts: int) -> tuple[WindowBatch, ...]:
        """At most `parts` batches of near-equal size that follow one another."""
        size = -(-len(self.windows) // parts)
        cuts = [slice(start, start + size) for start in range(0, len(self.windows), size)]
        return tuple(
            WindowBatch(self.frames[c], self.mask[c], self.segments[c], self.labels[c], self.windows[c])
            for c in cuts
        )


def load_inference_batches(
    video: Video, data_root: str, grid: GridConfig, window_batch: int, cache: FrameCache | None = None
) -> Iterator[WindowBatch]:
    """All windows of a video in order, `window_batch` at a time; a frame is decoded once, however many
    windows hold it. The pixels of a window do not depend on `window_batch`.

    Raises:
        AnnotationError: no file. VideoError: it cannot be read, or is not the annotated one.
    """
    video, reader = _opened(video, data_root, grid, grid.test_short_side_pixels, cache)
    windows = inference_windows(video, grid)
    held = np.zeros(0, np.int64)  # frame numbers, ascending, of `pixels`
    pixels = torch.zeros((3, 0, grid.crop_pixels, grid.crop_pixels), dtype=torch.uint8)
    for start in range(0, len(windows), window_batch):
        group = windows[start : start + window_batch]
        wanted = np.unique(np.concatenate([window.frame_indices for window in group]))
        kept = np.isin(held, wanted)
        fresh = np.setdiff1d(wanted, held)
        parts = [pixels[:, torch.from_numpy(kept)]]
        if len(fresh):
            parts.append(inference_clip(reader.read(fresh), grid))
        held = np.concatenate([held[kept], fresh])
        pixels = torch.cat(parts, dim=1)
        del parts  # else they stay while the batch is in use
        order = np.argsort(held)
        places = [order[np.searchsorted(held, window.frame_indices, sorter=order)] for window in group]
        yield _batch([pixels[:, torch.from_numpy(place)] for place in places], group, grid)


def load_training_batch(
    videos: Sequence[Video],
    data_root: str,
    grid: GridConfig,
    seed_key: tuple[int, ...],
    min_instance_fraction: float = 0.0,
    cache: FrameCache | None = None,
) -> WindowBatch:
    """One augmented window of every video. Its draws come from (seed_key, video id) alone: they are the same
    whatever else is in the batch, and wherever it is made.

    Args:
        seed_key: non-negative integers.

    Raises:
        AnnotationError: no file. VideoError: it cannot be read, or is not the annotated one.
    """
    clips, windows = [], []
    for video in videos:
        window_seed, pixel_seed = np.random.SeedSequence((*seed_key, crc32(video.id.encode()))).spawn(2)
        video, reader = _opened(video, data_root, grid, grid.train_short_side_pixels, cache)
        window = training_window(video, grid, np.random.default_rng(window_seed), min_instance_fraction)
        seed = int(pixel_seed.generate_state(1, np.uint64)[0])
        clips.append(training_clip(reader.read(window.frame_indices), grid, seed))
        windows.append(window)
    return _batch(clips, windows, grid)


def _opened(
    video: Video, data_root: str, grid: GridConfig, short_side: int, cache: FrameCache | None
) -> tuple[Video, FrameReader | CachedFrames]:
    """The video's frames, and the video with its file's frame count where the annotations give none."""
    path, short_side = video_file(video, data_root), max(short_side, grid.crop_pixels)
    if cache is not None and video.frames:
        return video, cache.open(path, short_side, grid_frames(video, grid), video.frames)
    reader = FrameReader(path, short_side)
    if not video.frames:
        return with_probe(video, reader.probe), reader
    reader.check_frames(video.frames)
    return video, reader


def _batch(clips: Sequence[torch.Tensor], windows: Sequence[Window], grid: GridConfig) -> WindowBatch:
    valid_steps = torch.tensor([window.valid_steps for window in windows])
    return WindowBatch(
        frames=torch.stack(list(clips)),
        mask=torch.arange(grid.feature_steps) < valid_steps[:, None],
        segments=tuple(torch.from_numpy(window.segments) for window in windows),
        labels=tuple(torch.from_numpy(window.labels).long() for window in windows),
        windows=tuple(windows),
    )
