"""Faults of the release, each emulated here to give its numbers, beside what ours does instead.

Others are shown where their numbers are compared: padded frames (`test_detector_golden`), rounding before
suppression (`test_postprocess_golden`), the start of the next round and the normaliser's EMA
(`test_alignment_golden`), repeated windows and unseen tails (`tests/data/test_windows.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pbd_ray.config import GridConfig
from pbd_ray.data.annotations import Video
from pbd_ray.data.windows import training_window
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.losses import updated_normalizer

pytestmark = pytest.mark.golden


class IntegerNormalizer(nn.Module):
    """The release's buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loss_normalizer", torch.tensor(100))


def test_the_normalizer_is_truncated_by_loading_there_and_not_here(reference: Any) -> None:
    trained = torch.tensor(reference.losses("train")["loss_normalizer_after"])
    assert float(trained) == pytest.approx(91.8)
    theirs = IntegerNormalizer()
    theirs.load_state_dict({"loss_normalizer": trained})
    assert theirs.loss_normalizer.item() == 91

    head = Detector(reference.config, reference.classes).head
    assert torch.equal(updated_normalizer(head.loss_normalizer, torch.tensor(18), 0.9), trained)
    head.load_state_dict(head.state_dict() | {"loss_normalizer": trained})
    assert torch.equal(head.loss_normalizer, trained)


def test_an_imported_normalizer_goes_on_as_a_float(reference: Any) -> None:
    stored = reference.tensors("teacher_weights")["rpn_head.loss_normalizer"]
    assert stored.dtype == torch.int64 and int(stored) == 100
    ours = reference.detector("teacher").head.loss_normalizer
    assert ours.dtype == torch.float32 and float(ours) == 100


def test_reading_a_video_again_shrinks_its_instances_there_and_not_here() -> None:
    """75 -> 18.75 -> 4.69: the release divides the stored boundaries by the stride on every read."""
    stored = np.array([[75.0, 150.0]])
    read = []
    for _ in range(2):
        stored /= 4
        read.append(stored[0, 0])
    assert read == [18.75, 4.6875]

    grid = GridConfig(crop_ratio=(1.0, 1.0))
    video = Video("v", "v.mp4", "training", 20.0, 30.0, 600, np.array([[2.5, 5.0]]), np.zeros(1, np.int32))
    starts = [training_window(video, grid, np.random.default_rng(0)).segments[0, 0] for _ in range(3)]
    assert starts == [18.75] * 3
    assert video.segments_seconds.tolist() == [[2.5, 5.0]]
