"""The detector's own losses: which point answers for which instance, focal loss, boundary loss.

Rules of ActionFormer (arXiv 2202.07925, sections 3.3 and 3.4) as the paper's release applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pbd_ray.config import HeadConfig
from pbd_ray.detector.actionformer import HeadOutput
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.points import segments_at

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
EPSILON = 1e-8
SAME_LENGTH_STEPS = 1e-3
"""Instances this close in length to the shortest one share the point: a point may have two classes."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What every point should say."""

    classes: Tensor
    """(B, P, C) float, 0 or 1; all zero: background."""
    offsets: Tensor
    """(B, P, 2) in units of the stride; meaningless at background points."""

    def positive(self, mask: Tensor) -> Tensor:
        """(B, P) bool: points in the video that answer for an instance."""
        return (self.classes.sum(dim=-1) > 0) & mask


@dataclass(frozen=True, eq=False)
class DetectionLosses:
    """Supervised losses of a batch, already divided by the normalizer."""

    focal: Tensor
    boundary: Tensor
    """With `head.boundary_weight` applied."""
    positives: Tensor
    """int64 count over the batch."""

    @property
    def total(self) -> Tensor:
        return self.focal + self.boundary


def widened(values: Tensor) -> Tensor:
    """In float32 at least: losses of half-precision outputs are not computed in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid focal loss, elementwise, any shape (arXiv 1708.02002, equation 5; alpha .25, gamma 2).

    Soft targets (label smoothing) are allowed. In float32 at least, whatever the logits are.
    """
    logits = widened(logits)
    probability = torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = probability * (1 - targets) + (1 - probability) * targets
    weight = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return weight * cross_entropy * miss**FOCAL_GAMMA


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - IoU + (distance of centres / length of the hull)^2 (arXiv 1911.08287, equation 7, in 1D).

    Args:
        predicted, target: (..., 2) of (start, end).

    Returns:
        (...), float32 at least.
    """
    predicted, target = widened(predicted), widened(target)
    iou, hull, _ = _overlap(predicted, target)
    distance = (predicted.sum(dim=-1) - target.sum(dim=-1)) / 2
    return 1 - iou + torch.square(distance / hull)


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - IoU + share of the hull that neither covers (arXiv 1902.09630, algorithm 1, in 1D).

    Shapes as of `diou_loss`.
    """
    iou, hull, union = _overlap(widened(predicted), widened(target))
    return 1 - iou + (hull - union) / hull


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, length of the hull, length of the union; the lengths are positive."""
    shared = (torch.minimum(a[..., 1], b[..., 1]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    union = ((a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - shared).clamp(min=EPSILON)
    hull = torch.maximum(a[..., 1], b[..., 1]) - torch.minimum(a[..., 0], b[..., 0])
    return shared / union, hull.clamp(min=EPSILON), union


def assign_targets(
    points: Tensor,
    segments: Sequence[Tensor],
    labels: Sequence[Tensor],
    num_classes: int,
    center_radius: float,
) -> Targets:
    """Give every point its class and offsets (ActionFormer, section 3.4, center sampling).

    A point answers for an instance if it lies inside it, within `center_radius` strides of its
    centre, and the farther boundary is within the regression range of the point's level. Of several
    such instances the shortest wins.

    Args:
        points: (P, 4).
        segments: for every sample (n, 2), in feature steps.
        labels: for every sample (n,) integer.
    """
    classes = points.new_zeros((len(segments), len(points), num_classes))
    offsets = points.new_zeros((len(segments), len(points), 2))
    for i, (segment, label) in enumerate(zip(segments, labels, strict=True)):
        if len(segment):
            label = label.to(points.device, torch.int64)
            one_hot = F.one_hot(label, num_classes).to(points.dtype)
            classes[i], offsets[i] = _assign(points, segment.to(points), one_hot, center_radius)
    return Targets(classes, offsets)


def _assign(points: Tensor, segments: Tensor, one_hot: Tensor, center_radius: float) -> tuple[Tensor, Tensor]:
    """Classes (P, C) and offsets (P, 2) of one sample with n >= 1 instances."""
    t, low, high, stride = (column[:, None] for column in points.unbind(dim=1))
    start, end = segments.unbind(dim=1)
    centre = (start + end) / 2
    reach = stride * center_radius
    central = (t > torch.maximum(centre - reach, start)) & (t < torch.minimum(centre + reach, end))
    distances = torch.stack((t - start, end - t), dim=-1)
    farthest = distances.amax(dim=-1)
    candidate = central & (farthest >= low) & (farthest <= high)
    length = (end - start).expand_as(farthest).masked_fill(~candidate, torch.inf)
    shortest, winner = length.min(dim=1, keepdim=True)
    winners = candidate & (length <= shortest + SAME_LENGTH_STEPS)
    classes = (winners.to(one_hot.dtype) @ one_hot).clamp(max=1)
    offsets = distances.gather(1, winner[..., None].expand(-1, -1, 2)).squeeze(1) / stride
    return classes, offsets


def updated_normalizer(normalizer: Tensor, positives: Tensor, momentum: float) -> Tensor:
    """The loss normalizer after a batch: a running mean of its positives, at least one, in float.

    Call it in training only. Under DDP `positives` is the count of the global batch, so that all
    ranks hold the same normalizer.
    """
    return momentum * normalizer + (1 - momentum) * positives.clamp(min=1).to(normalizer)


def detection_losses(
    output: DetectorOutput | HeadOutput,
    segments: Sequence[Tensor],
    labels: Sequence[Tensor],
    head: HeadConfig,
    normalizer: Tensor,
    targets: Targets | None = None,
) -> DetectionLosses:
    """Focal loss over all points in the video and DIoU over positive points, sums / normalizer.

    Args:
        segments, labels: for every sample (n, 2) in feature steps and (n,).
        normalizer: scalar. Training: the updated running mean; the release's evaluation mode: the
            batch's positives, at least one.
        targets: of `assign_targets`, where the caller has them already (to count positives first).
    """
    num_classes = output.logits.shape[-1]
    if targets is None:
        targets = assign_targets(output.points, segments, labels, num_classes, head.center_radius)
    smooth = head.label_smoothing
    wanted = targets.classes * (1 - smooth) + smooth / (num_classes + 1)
    focal = focal_loss(output.logits[output.mask], wanted[output.mask]).sum()
    positive = targets.positive(output.mask)
    predicted = segments_at(output.points, widened(output.offsets))[positive]
    truth = segments_at(output.points, targets.offsets)[positive]
    boundary = diou_loss(predicted, truth).sum() * head.boundary_weight
    return DetectionLosses(focal / normalizer, boundary / normalizer, positive.sum())
