"""A recipe's models as bundles, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pbd_ray.compression.blocks import Model, from_detector, to_detector
from pbd_ray.config import DetectorConfig
from pbd_ray.detector.bundle import bundle_files, bundle_from_files
from pbd_ray.metrics.cost import cost_report
from pbd_ray.search.state import Cost


@dataclass(frozen=True)
class Packing:
    """How models of one architecture become files and come back."""

    config: DetectorConfig
    classes: Sequence[str]

    def files(self, model: Model, facts: Mapping[str, Any]) -> Mapping[str, bytes]:
        """The bundle of a model, with facts about its making."""
        return bundle_files(to_detector(model, self.config, len(self.classes)), self.classes, facts)

    def cost(self, model: Model) -> Cost:
        """Computed cost of one window."""
        report = cost_report(to_detector(model, self.config, len(self.classes)))
        macs = report.macs
        return Cost(macs=macs.total, block_macs=sum(macs.blocks.values()), params=report.parameters.total)


def model_of(files: Mapping[str, bytes], where: str) -> Model:
    """The model of a bundle.

    Args:
        where: names it in errors.

    Raises:
        BundleError: the files are no bundle.
    """
    return from_detector(bundle_from_files(files, where).detector)
