"""All that a report is made from: what a run directory holds, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Annotations
from pbd_ray.report.forecast import Forecast


@dataclass(frozen=True, eq=False)
class DepthEvidence:
    """What is kept of the teacher or of one committed round besides its entry in summary.json."""

    detections: pa.Table
    """On the test videos, DETECTION_SCHEMA, named as mAP compares them."""
    curves: pa.Table | None
    """Every epoch of every learning rate; None for the teacher and where nothing was trained."""
    measured: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Evidence:
    """A run so far. The teacher's detections are there from its commit on."""

    location: str
    recipe: Recipe
    summary: Mapping[str, Any]
    """summary.json."""
    environment: Mapping[str, Any]
    """environment.json."""
    test: Annotations
    """The test videos with the labels that mAP compares with."""
    plan: Forecast | None
    """What the run was expected to take, where that was asked before it began."""
    counts: Mapping[str, int]
    """Part of the split (fit, selection, test) -> number of videos."""
    teacher: DepthEvidence
    rounds: Sequence[DepthEvidence]
    """In the order of `summary["rounds"]`."""
