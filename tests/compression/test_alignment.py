"""Alignment losses against loops and scipy-free formulas; the release's numbers are in the golden tier."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pbd_ray.compression.alignment import AlignmentTerms, alignment_terms, class_loss, feature_loss
from pbd_ray.config import AlignmentConfig
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.points import pyramid_points

POINTS = pyramid_points(8, [(0, 4), (4, 100)])  # 8 + 4 points
BLOCKS = (0, 3)


def output(seed: int, num_classes: int = 5, blocks: tuple[int, ...] = BLOCKS) -> DetectorOutput:
    generator = torch.Generator().manual_seed(seed)
    count = len(POINTS)
    mask = torch.ones((3, count), dtype=torch.bool)
    mask[1, 5:8] = mask[1, 10:] = False
    return DetectorOutput(
        logits=4 * torch.randn((3, count, num_classes), generator=generator),
        offsets=3 * torch.rand((3, count, 2), generator=generator),
        mask=mask,
        points=POINTS,
        block_outputs={block: torch.randn((6, 4, 7), generator=generator) for block in blocks},
    )


def positive() -> Tensor:
    chosen = torch.zeros((3, len(POINTS)), dtype=torch.bool)
    chosen[0, 3] = chosen[1, 1] = chosen[1, 9] = chosen[2, 11] = True
    return chosen


def softmax_kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for ours, theirs in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p = [math.exp(x / temperature) for x in theirs]
        q = [math.exp(x / temperature) for x in ours]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total * temperature**2


def bernoulli_kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for ours, theirs in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = (1 / (1 + math.exp(-x / temperature)) for x in (theirs, ours))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.5])
@pytest.mark.parametrize(("num_classes", "reference"), [(1, bernoulli_kl), (2, softmax_kl), (5, softmax_kl)])
def test_class_loss(temperature: float, num_classes: int, reference: Any) -> None:
    student, teacher = (2 * torch.randn((9, num_classes)) for _ in range(2))
    expected = reference(student, teacher, temperature)
    assert expected > 0.01
    assert float(class_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(class_loss(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-5)


def test_class_loss_of_extreme_logits_is_finite() -> None:
    student = torch.tensor([[500.0, -500.0], [0.0, 1e4]], requires_grad=True)
    loss = class_loss(student, -student.detach(), 3.5)
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and torch.isfinite(student.grad).all()


def test_feature_loss_goes_by_original_index() -> None:
    """Only the student's blocks count, each against the teacher's block of the same index."""
    student, teacher = output(0, blocks=(0, 3, 4)), output(1, blocks=(0, 1, 2, 3, 4))
    expected = np.mean(
        [
            np.mean(
                (student.block_outputs[b].double().numpy() - teacher.block_outputs[b].double().numpy()) ** 2
            )
            for b in (0, 3, 4)
        ]
    )
    ours = feature_loss(student.block_outputs, teacher.block_outputs)
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)


def diou(a: tuple[float, float], b: tuple[float, float]) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    hull = max(a[1], b[1]) - min(a[0], b[0])
    iou = shared / (a[1] - a[0] + b[1] - b[0] - shared)
    return 1 - iou + ((a[0] + a[1] - b[0] - b[1]) / 2 / hull) ** 2


def giou(a: tuple[float, float], b: tuple[float, float]) -> float:
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    hull = max(a[1], b[1]) - min(a[0], b[0])
    union = a[1] - a[0] + b[1] - b[0] - shared
    return 1 - shared / union + (hull - union) / hull


@pytest.mark.parametrize(("kind", "distance"), [("diou", diou), ("giou", giou)])
def test_terms(kind: str, distance: Any) -> None:
    """Class loss over valid points, boundary loss over positive ones, divided by what the caller says."""
    student, teacher = output(0), output(1)
    config = AlignmentConfig.model_validate({"boundary_loss": kind})
    terms = alignment_terms(student, teacher, positive(), config, valid_points=31.0, positives=7.0)
    valid = student.mask
    expected_kl = softmax_kl(student.logits[valid], teacher.logits[valid], 3.5) / 31
    expected_boundary = 0.0
    for row, point in positive().nonzero().tolist():
        t, _, _, stride = POINTS[point].tolist()
        ends = [
            (t - o.offsets[row, point, 0].item() * stride, t + o.offsets[row, point, 1].item() * stride)
            for o in (student, teacher)
        ]
        expected_boundary += distance(*ends)
    assert float(terms.class_kl) == pytest.approx(expected_kl, rel=1e-5)
    assert float(terms.boundary) == pytest.approx(expected_boundary / 7, rel=1e-5)
    assert float(terms.feature) == float(feature_loss(student.block_outputs, teacher.block_outputs))


@pytest.mark.parametrize(
    ("changes", "teacher", "zero"),
    [
        ({}, True, set()),
        ({"feature_loss": False}, True, {"feature"}),
        ({"prediction_loss": False}, True, {"class_kl", "boundary"}),
        ({"feature_loss": False, "prediction_loss": False}, True, {"feature", "class_kl", "boundary"}),
        ({}, False, {"feature", "class_kl", "boundary"}),
    ],
)
def test_levels_can_be_switched_off(changes: dict[str, bool], teacher: bool, zero: set[str]) -> None:
    """Table G; and nothing is aligned without a teacher."""
    config = AlignmentConfig.model_validate(changes)
    guide = output(1) if teacher else None
    terms = alignment_terms(output(0), guide, positive(), config, 31.0, 4.0)
    found = {name for name in ("feature", "class_kl", "boundary") if float(getattr(terms, name)) == 0}
    assert found == zero


def test_no_positive_point_is_no_boundary_loss() -> None:
    nothing = torch.zeros((3, len(POINTS)), dtype=torch.bool)
    terms = alignment_terms(output(0), output(1), nothing, AlignmentConfig(), 31.0, 1.0)
    assert float(terms.boundary) == 0 and float(terms.class_kl) > 0


def test_weights() -> None:
    terms = AlignmentTerms(torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0))
    assert float(terms.weighted(AlignmentConfig())) == 111
    config = AlignmentConfig(feature_weight=2, class_weight=0, boundary_weight=0.5)
    assert float(terms.weighted(config)) == 52


def test_only_the_student_is_pulled() -> None:
    student, teacher = output(0), output(1)
    for value in (student.logits, student.offsets, *student.block_outputs.values()):
        value.requires_grad_()
    terms = alignment_terms(student, teacher, positive(), AlignmentConfig(), 31.0, 4.0)
    terms.weighted(AlignmentConfig()).backward()
    assert student.logits.grad is not None
    assert not student.logits.grad[~student.mask].any()
    pulled = student.offsets.grad
    assert pulled is not None and torch.equal((pulled != 0).any(dim=-1), positive())
