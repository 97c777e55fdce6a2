"""A teacher that was never fitted: what is compared on a cluster is the same for any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pbd_ray.config import load_recipe
from pbd_ray.data import synthetic
from pbd_ray.detector.bundle import save_bundle
from pbd_ray.detector.detector import Detector


@pytest.fixture(scope="session")
def teacher(tiny_recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, of the tiny recipe's shape."""
    folder = tmp_path_factory.mktemp("bundles") / "teacher"
    torch.manual_seed(0)
    detector = Detector(load_recipe(tiny_recipe).experiment.detector, len(synthetic.CLASSES))
    save_bundle(folder, detector, synthetic.CLASSES, {})
    return folder
