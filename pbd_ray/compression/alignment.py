"""Alignment losses between the frozen teacher and the student (paper, section 3.3; design, section 2).

Class and boundary losses are sums: the caller divides by the number of valid or positive points of the
global batch, which one rank does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pbd_ray.config import AlignmentConfig
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.losses import diou_loss, giou_loss, widened
from pbd_ray.detector.points import segments_at


@dataclass(frozen=True, eq=False)
class AlignmentTerms:
    """The three losses, not yet weighted; zero where the recipe switches one off (paper, Table G)."""

    feature: Tensor
    class_kl: Tensor
    boundary: Tensor

    def weighted(self, config: AlignmentConfig) -> Tensor:
        """Their sum by the recipe's weights (all 1 in the paper)."""
        return (
            config.feature_weight * self.feature
            + config.class_weight * self.class_kl
            + config.boundary_weight * self.boundary
        )


def alignment_terms(
    student: DetectorOutput,
    teacher: DetectorOutput | None,
    positive: Tensor,
    config: AlignmentConfig,
    valid_points: float,
    positives: float,
) -> AlignmentTerms:
    """L_feature, L_class and L_boundary of a batch.

    Args:
        teacher: None where nothing is aligned.
        positive: (B, P) bool, the points that answer for an instance.
        valid_points, positives: counts to divide by. With several ranks or micro-batches they are
            those of the global batch, so that the parts sum to its loss.
    """
    zero = student.logits.new_zeros(())
    feature = class_kl = boundary = zero
    if teacher is not None and config.feature_loss:
        feature = feature_loss(student.block_outputs, teacher.block_outputs)
    if teacher is not None and config.prediction_loss:
        valid = student.mask
        logits, guide = widened(student.logits[valid]), widened(teacher.logits[valid])
        class_kl = class_loss(logits, guide, config.temperature) / valid_points
        boundary = boundary_loss(student, teacher, positive, config.boundary_loss) / positives
    return AlignmentTerms(feature, class_kl, boundary)


def feature_loss(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> Tensor:
    """L_feature: mean over the student's kept blocks of MSE with the teacher's block of the same index.

    Args:
        student, teacher: original block index -> tokens (batch * chunks, N, d).
    """
    per_block = [F.mse_loss(output, teacher[block]) for block, output in student.items()]
    return torch.stack(per_block).mean()


def class_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """L_class times the valid points: T^2 * KL(teacher || student), softmax over classes at T, summed.

    With one class a softmax is constant and its KL identically 0, so the KL of the two Bernoulli
    distributions of the sigmoid is taken instead.

    Args:
        student, teacher: class logits (K, C) of the valid points.
    """
    scaled_student, scaled_teacher = student / temperature, teacher / temperature
    if student.shape[-1] == 1:
        scaled_student = torch.cat([scaled_student, torch.zeros_like(scaled_student)], dim=-1)
        scaled_teacher = torch.cat([scaled_teacher, torch.zeros_like(scaled_teacher)], dim=-1)
    divergence = F.kl_div(
        F.log_softmax(scaled_student, dim=-1),
        F.log_softmax(scaled_teacher, dim=-1),
        reduction="sum",
        log_target=True,
    )
    return divergence * temperature**2


def boundary_loss(
    student: DetectorOutput, teacher: DetectorOutput, positive: Tensor, kind: Literal["diou", "giou"]
) -> Tensor:
    """L_boundary times the positive points: distance of student and teacher segments, summed.

    DIoU is what the release computes, GIoU what the paper writes.

    Args:
        positive: (B, P) bool, the points that answer for an instance.
    """
    distance = diou_loss if kind == "diou" else giou_loss
    ours = segments_at(student.points, widened(student.offsets))[positive]
    theirs = segments_at(teacher.points, widened(teacher.offsets))[positive]
    return distance(ours, theirs).sum()
