"""What all formats have in common: how one is written, read again, and how near it must come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pbd_ray.detector.bundle import Bundle
from pbd_ray.detector.detector import DetectorOutput

Forward = Callable[[Tensor, Tensor], DetectorOutput]
"""As `Detector.forward`: frames (B, 3, window_frames, H, W) uint8, mask (B, feature_steps) bool."""


@dataclass(frozen=True)
class Tolerance:
    """The largest absolute differences from the bundle that an export may have."""

    logits: float
    offsets: float
    """In strides of the point's level."""
    map: float
    """Of the mAP at any threshold."""
    reason: str
    """Why not 0, or why 0."""


@dataclass(frozen=True)
class Format:
    """One form of a detector for other programs. The bundles it takes have no gaps (`without_gaps`)."""

    name: str
    write: Callable[[Bundle, Path], None]
    """Fill an empty folder.

    Raises:
        UserError: the format cannot hold this detector, or a package is missing.
    """
    read: Callable[[Path, Bundle], Forward]
    """What the files in the folder compute. Of the bundle only what the format leaves out is used."""
    tolerance: Tolerance
    packages: tuple[str, ...]
    """Whose versions decide what was written and computed."""
