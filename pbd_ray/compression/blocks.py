"""Dropping transformer blocks.

A block is one whole transformer layer. A dropped block is the identity and keeps its index: block 7 is
block 7 for ever, in weight names, logs and the ledger (paper, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pbd_ray.config import DetectorConfig

if TYPE_CHECKING:
    from pbd_ray.detector.detector import Detector

UNDROPPED = -1
"""The candidate that drops nothing: the student itself."""


@dataclass(frozen=True, eq=False)
class Model:
    """A detector as a value: which blocks it keeps and its merged weights by name."""

    kept_blocks: tuple[int, ...]
    weights: Mapping[str, np.ndarray]


def without_block(model: Model, block: int) -> Model:
    """The model less one block (original index).

    Raises:
        ValueError: the block is not kept, or is the last one.
    """
    if block not in model.kept_blocks:
        raise ValueError(f"block {block} is not among the kept blocks {list(model.kept_blocks)}")
    if len(model.kept_blocks) == 1:
        raise ValueError(f"block {block} is the last block")
    prefix = f"backbone.blocks.{block}."
    return Model(
        kept_blocks=tuple(kept for kept in model.kept_blocks if kept != block),
        weights={name: value for name, value in model.weights.items() if not name.startswith(prefix)},
    )


def without_gaps(model: Model, config: DetectorConfig) -> tuple[Model, DetectorConfig]:
    """The same model, its kept blocks numbered 0, 1, 2 ... as those of an uncompressed detector.

    For what leaves the product: inside it a block keeps its index. Drop path, which only training sees,
    rises over the new indices.
    """
    place = {str(block): str(index) for index, block in enumerate(model.kept_blocks)}

    def renamed(name: str) -> str:
        parts = name.split(".")
        if parts[:2] == ["backbone", "blocks"]:
            parts[2] = place[parts[2]]
        return ".".join(parts)

    depth = len(model.kept_blocks)
    backbone = config.backbone.model_copy(update={"depth": depth})
    weights = {renamed(name): value for name, value in model.weights.items()}
    return Model(tuple(range(depth)), weights), config.model_copy(update={"backbone": backbone})


def to_detector(model: Model, config: DetectorConfig, num_classes: int) -> Detector:
    """A detector in eval mode holding a copy of the model's weights."""
    import torch  # seconds that a command which only reads a run directory does not spend

    from pbd_ray.detector.detector import Detector

    detector = Detector(config, num_classes, kept_blocks=model.kept_blocks)
    # The copy matters: arrays out of Ray's object store are read-only and shared between workers.
    detector.load_state_dict({name: torch.tensor(value) for name, value in model.weights.items()})
    return detector.eval()


def from_detector(detector: Detector) -> Model:
    """The value of a detector without adapters; weights are copied to the host."""
    weights = {name: value.detach().cpu().numpy().copy() for name, value in detector.state_dict().items()}
    return Model(tuple(detector.kept_blocks), weights)
