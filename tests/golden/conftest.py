"""The released code's tiny detectors: config, weights, inputs and numbers (see the reference's README)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file
from torch import Tensor

from pbd_ray.config import BackboneConfig, DetectorConfig, GridConfig, HeadConfig
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.opentad import load_opentad


@dataclass(frozen=True)
class Reference:
    """Teacher and student (block 2 dropped, LoRA apart) of one seed."""

    folder: Path
    seed: int

    config: ClassVar = DetectorConfig(
        grid=GridConfig(window_frames=64, feature_steps=64, crop_pixels=64),
        backbone=BackboneConfig(
            embed_dim=48, depth=6, num_heads=3, position_table_pixels=96, drop_path=0.0, unused_norm=True
        ),
        head=HeadConfig(channels=32, drop_path=0.0),
    )
    kept: ClassVar = {"teacher": (0, 1, 2, 3, 4, 5), "student": (0, 1, 3, 4, 5)}
    classes: ClassVar = 20

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"tiny_seed{self.seed}_{name}.safetensors")

    def results(self) -> dict[str, Any]:
        with gzip.open(self.folder / f"tiny_seed{self.seed}_results.json.gz") as file:
            results: dict[str, Any] = json.load(file)
        return results

    def losses(self, mode: str) -> dict[str, float]:
        losses: dict[str, float] = self.results()["losses"][mode]
        return losses

    def steps(self) -> dict[str, Any]:
        steps: dict[str, Any] = json.loads((self.folder / f"tiny_seed{self.seed}_train6.json").read_text())
        return steps

    def truth(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Segments and labels of the two windows."""
        inputs = self.tensors("inputs")
        return tuple(inputs[f"gt_segments.{i}"] for i in range(2)), tuple(
            inputs[f"gt_labels.{i}"] for i in range(2)
        )

    def detector(self, who: str, kept: Sequence[int] | None = None, merge_lora: bool = True) -> Detector:
        """Ours with their weights, and their leak: padded frames reach the head's first convolution."""
        detector = Detector(self.config, self.classes, self.kept[who] if kept is None else kept).eval()
        load_opentad(detector, self.tensors(f"{who}_weights"), merge_lora=merge_lora)
        detector.head.mask_input = False
        return detector


@pytest.fixture(params=[0, 1], ids=["seed0", "seed1"])
def reference(shared: Path, request: pytest.FixtureRequest) -> Reference:
    return Reference(shared / "reference", request.param)
