"""Positions: the points of the feature pyramid, segments around them, and sinusoidal tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pyramid_points(feature_steps: int, regression_ranges: Sequence[tuple[float, float]]) -> Tensor:
    """Points of every level, finest first (ActionFormer, section 3.3).

    Level l has stride 2**l and points at the multiples of its stride, not at the middle of its cells.

    Args:
        feature_steps: length of the finest level, a multiple of the coarsest stride.
        regression_ranges: one (low, high) a level, in feature steps.

    Returns:
        (P, 4) float32 of (t, low, high, stride), all in feature steps.
    """
    levels = []
    for level, (low, high) in enumerate(regression_ranges):
        stride = 2**level
        t = torch.arange(0, feature_steps, stride, dtype=torch.float32)
        rest = torch.tensor([low, high, stride], dtype=torch.float32)
        levels.append(torch.cat((t[:, None], rest.expand(len(t), 3)), dim=1))
    return torch.cat(levels)


def pyramid_mask(mask: Tensor, levels: int) -> Tensor:
    """Which points lie in the video: (B, feature_steps) bool -> (B, P) bool, finest level first."""
    return torch.cat([mask[:, :: 2**level] for level in range(levels)], dim=1)


def segments_at(points: Tensor, offsets: Tensor) -> Tensor:
    """Segments that offsets mean at their points.

    Args:
        points: (P, 4) as of `pyramid_points`.
        offsets: (..., P, 2) distances to start and end, in units of the point's stride.

    Returns:
        (..., P, 2) of (start, end) in feature steps, not clipped to the window.
    """
    t, stride = points[:, 0], points[:, 3]
    return torch.stack((t - offsets[..., 0] * stride, t + offsets[..., 1] * stride), dim=-1)


def sinusoid_table(positions: int, dim: int) -> Tensor:
    """The fixed position table of "Attention is all you need" (section 3.5), as VideoMAE uses it.

    Returns:
        (positions, dim) float32: even columns sine, odd columns cosine, computed in float64.
    """
    rates = np.power(10000.0, -2.0 * (np.arange(dim) // 2) / dim)
    angles = np.arange(positions)[:, None] * rates
    table = np.where(np.arange(dim) % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.from_numpy(table.astype(np.float32))
