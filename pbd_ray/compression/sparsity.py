"""How sparse the hidden activation of a detector's MLPs is.

A ReLU writes exact zeros, which a sparse product can skip (paper, supplement, Table C); a GELU writes
hardly any, but the share of its negative inputs says what a ReLU in its place would.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pbd_ray.compression.precision import Autocast, autocast_context
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.videomae import VideoMAE


@dataclass(frozen=True)
class Sparsity:
    """Shares over all elements of the hidden activations, so a block or a window counts by its size."""

    zeros: float
    """Exact zeros of the activation's output."""
    negative: float
    """Inputs of the activation below zero."""
    zeros_by_block: Mapping[int, float]
    """By original index."""
    elements: int
    windows: int
    dtype: str
    """Of the activation's output."""


@torch.inference_mode()
def measure_sparsity(
    detector: Detector, batches: Iterable[WindowBatch], autocast: Autocast, device: torch.device
) -> Sparsity:
    """Count over windows of videos; tokens that hold no video (the padded end of a window) are left out.

    Raises:
        ValueError: there are no windows.
    """
    zeros: Counter[int] = Counter()
    negative: Counter[int] = Counter()
    elements: Counter[int] = Counter()
    dtypes: set[str] = set()
    real = torch.empty(0, dtype=torch.bool)
    windows = 0

    def count(block: int, before: Tensor, after: Tensor) -> None:
        zeros[block] += int((after[real] == 0).sum())
        negative[block] += int((before[real] < 0).sum())
        elements[block] += after[real].numel()
        dtypes.add(str(after.dtype).removeprefix("torch."))

    backbone = detector.to(device).eval().backbone
    with _watching(backbone, count), autocast_context(autocast, device):
        for batch in batches:
            batch = batch.to(device)
            real = real_tokens(backbone, batch)
            backbone(batch.frames)
            windows += len(batch.mask)
    if not windows:
        raise ValueError("sparsity of no windows")
    (dtype,) = dtypes
    total = elements.total()
    return Sparsity(
        zeros=zeros.total() / total,
        negative=negative.total() / total,
        zeros_by_block={block: zeros[block] / elements[block] for block in backbone.kept_blocks},
        elements=total,
        windows=windows,
        dtype=dtype,
    )


def real_tokens(backbone: VideoMAE, batch: WindowBatch) -> Tensor:
    """(B * chunks, N) bool: which tokens of the backbone hold video, were it only one frame of a tubelet.

    N is ordered time, row, column; all chunks of a window follow one another.
    """
    _, _, frames, height, width = batch.frames.shape
    config = backbone.config
    steps = frames // config.tubelet_frames
    places = (height // config.patch_pixels) * (width // config.patch_pixels)
    feature_steps = batch.mask.shape[1]
    valid = batch.mask.sum(dim=1)  # a window's video comes first, then padding
    held = torch.ceil(valid * steps / feature_steps)
    by_step = torch.arange(steps, device=valid.device) < held[:, None]
    return by_step.reshape(-1, backbone.chunk_steps).repeat_interleave(places, dim=1)


@contextlib.contextmanager
def _watching(backbone: VideoMAE, count: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    def hook(block: int) -> Callable[[Any, tuple[Tensor], Tensor], None]:
        return lambda module, inputs, output: count(block, inputs[0], output)

    handles = [
        backbone.get_submodule(f"blocks.{block}.mlp.act").register_forward_hook(hook(block))
        for block in backbone.kept_blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
