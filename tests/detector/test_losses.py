"""Losses against torchvision and against the rules written as loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import distance_box_iou_loss, generalized_box_iou_loss, sigmoid_focal_loss

from pbd_ray.config import HeadConfig
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.losses import (
    Targets,
    assign_targets,
    detection_losses,
    diou_loss,
    focal_loss,
    giou_loss,
    updated_normalizer,
)
from pbd_ray.detector.points import pyramid_points

HEAD = HeadConfig()
POINTS = pyramid_points(64, HEAD.regression_ranges)


def random_segments(count: int) -> Tensor:
    start = torch.rand(count) * 50
    return torch.stack((start, start + 0.5 + torch.rand(count) * 20), dim=1)


def as_boxes(segments: Tensor, height: float) -> Tensor:
    start, end = segments.double().unbind(1)
    return torch.stack((start, torch.zeros_like(start), end, torch.full_like(start, height)), dim=1)


def test_focal_loss_equals_torchvision() -> None:
    logits, targets = 5 * torch.randn(100, 7), torch.rand(100, 7)
    targets[:50] = targets[:50].round()
    torch.testing.assert_close(focal_loss(logits, targets), sigmoid_focal_loss(logits, targets))


def test_focal_loss_is_float32_for_half_logits() -> None:
    logits = torch.tensor([-12.0, 12.0], dtype=torch.float16)
    loss = focal_loss(logits, torch.tensor([1.0, 0.0]))
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()


def test_diou_loss_equals_flat_boxes() -> None:
    a, b = random_segments(200), random_segments(200)
    # torchvision's diagonal has the height in it; a flat box has none to speak of.
    expected = distance_box_iou_loss(as_boxes(a, 1e-4), as_boxes(b, 1e-4), eps=0)
    torch.testing.assert_close(diou_loss(a, b).double(), expected, rtol=1e-4, atol=1e-5)


def test_giou_loss_equals_boxes_of_one_height() -> None:
    a, b = random_segments(200), random_segments(200)
    expected = generalized_box_iou_loss(as_boxes(a, 1.0), as_boxes(b, 1.0))
    torch.testing.assert_close(giou_loss(a, b).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [diou_loss, giou_loss])
def test_overlap_losses_at_the_edges(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    same = torch.tensor([[2.0, 5.0]])
    assert loss(same, same).item() == 0
    apart = torch.tensor([[0.0, 1.0]], requires_grad=True)
    far = loss(apart, torch.tensor([[50.0, 51.0]]))
    assert 1 < far.item() < 2
    far.sum().backward()
    assert apart.grad is not None
    assert (apart.grad != 0).any()
    point = torch.tensor([[3.0, 3.0]], requires_grad=True)
    loss(point, torch.tensor([[3.0, 3.0]])).sum().backward()
    assert point.grad is not None
    assert torch.isfinite(point.grad).all()


def loop_targets(segments: Tensor, labels: Tensor, classes: int, radius: float) -> tuple[Tensor, Tensor]:
    """The assignment rule, one point and one instance at a time, in float64."""
    cls, reg = torch.zeros(len(POINTS), classes), torch.zeros(len(POINTS), 2)
    for p, (t, low, high, stride) in enumerate(POINTS.tolist()):
        best = []
        for n, (start, end) in enumerate(segments.tolist()):
            centre = (start + end) / 2
            inside = start < t < end and abs(t - centre) < radius * stride
            if inside and low <= max(t - start, end - t) <= high:
                best.append((end - start, n))
        if not best:
            continue
        length, winner = min(best)
        for other, n in best:
            if other <= length + 1e-3:
                cls[p, labels[n]] = 1
        start, end = segments[winner].tolist()
        reg[p] = torch.tensor([(t - start) / stride, (end - t) / stride])
    return cls, reg


@pytest.mark.parametrize("seed", range(5))
def test_targets_equal_the_rule_in_a_loop(seed: int) -> None:
    torch.manual_seed(seed)
    segments, labels = random_segments(9), torch.randint(0, 4, (9,))
    targets = assign_targets(POINTS, [segments], [labels], 4, 1.5)
    cls, reg = loop_targets(segments, labels, 4, 1.5)
    assert torch.equal(targets.classes[0], cls)
    positive = cls.sum(1) > 0
    assert positive.any()
    torch.testing.assert_close(targets.offsets[0][positive], reg[positive])


def test_shortest_instance_wins_and_equal_lengths_share() -> None:
    segments = torch.tensor([[18.0, 26.0], [21.0, 24.0], [21.0, 24.0]])
    labels = torch.tensor([0, 1, 2])
    targets = assign_targets(POINTS, [segments], [labels], 3, 1.5)
    assert targets.classes[0, 22].tolist() == [0, 1, 1]
    assert targets.offsets[0, 22].tolist() == [1, 2]


def test_samples_without_instances_are_background() -> None:
    segments = [torch.zeros(0, 2), torch.tensor([[10.0, 13.0]])]
    labels = [torch.zeros(0, dtype=torch.int32), torch.tensor([1], dtype=torch.int32)]
    targets = assign_targets(POINTS, segments, labels, 2, 1.5)
    assert not targets.classes[0].any()
    assert targets.classes[1].any()


def test_positive_points_lie_in_the_video() -> None:
    targets = assign_targets(POINTS, [torch.tensor([[10.0, 13.0]])], [torch.tensor([0])], 2, 1.5)
    mask = torch.ones(1, len(POINTS), dtype=torch.bool)
    count = int(targets.positive(mask).sum())
    mask[0, int(targets.positive(mask)[0].nonzero()[0])] = False
    assert int(targets.positive(mask).sum()) == count - 1


def random_output(classes: int = 3) -> DetectorOutput:
    mask = torch.ones(2, len(POINTS), dtype=torch.bool)
    mask[1, 50:64] = False
    logits = torch.randn(2, len(POINTS), classes, requires_grad=True)
    offsets = torch.rand(2, len(POINTS), 2, requires_grad=True)
    return DetectorOutput(logits, offsets, mask, POINTS)


SEGMENTS = [torch.tensor([[10.0, 13.0], [30.0, 42.0]]), torch.tensor([[50.0, 60.0]])]
LABELS = [torch.tensor([0, 2]), torch.tensor([1])]


def test_detection_losses_by_hand() -> None:
    head = HEAD.model_copy(update={"label_smoothing": 0.1, "boundary_weight": 2.0})
    output = random_output()
    losses = detection_losses(output, SEGMENTS, LABELS, head, torch.tensor(50.0))
    targets = assign_targets(POINTS, SEGMENTS, LABELS, 3, 1.5)
    focal, boundary, count = torch.zeros(()), torch.zeros(()), 0
    for b in range(2):
        for p in range(len(POINTS)):
            if not output.mask[b, p]:
                continue
            wanted = 0.9 * targets.classes[b, p] + 0.1 / 4
            focal += sigmoid_focal_loss(output.logits[b, p], wanted, reduction="sum")
            if targets.classes[b, p].any():
                count += 1
                t, stride = POINTS[p, 0], POINTS[p, 3]
                ends = torch.tensor([-1.0, 1.0])
                predicted, truth = (t + ends * o[b, p] * stride for o in (output.offsets, targets.offsets))
                boundary += diou_loss(predicted, truth)
    torch.testing.assert_close(losses.focal, focal / 50)
    torch.testing.assert_close(losses.boundary, 2 * boundary / 50)
    torch.testing.assert_close(losses.total, (focal + 2 * boundary) / 50)
    assert int(losses.positives) == count > 0


def test_targets_may_be_given() -> None:
    output = random_output()
    targets = assign_targets(POINTS, SEGMENTS, LABELS, 3, HEAD.center_radius)
    normalizer = torch.tensor(10.0)
    given = detection_losses(output, SEGMENTS, LABELS, HEAD, normalizer, targets)
    assert torch.equal(given.total, detection_losses(output, SEGMENTS, LABELS, HEAD, normalizer).total)
    assert int(given.positives) == int(targets.positive(output.mask).sum())


def test_a_batch_without_instances_trains_the_background_only() -> None:
    """The boundary loss is an exact zero that still hangs on the graph: DDP needs the gradient."""
    output = random_output()
    empty = [torch.zeros(0, 2)] * 2
    losses = detection_losses(
        output, empty, [torch.zeros(0, dtype=torch.int64)] * 2, HEAD, torch.tensor(10.0)
    )
    assert losses.boundary.item() == 0
    assert int(losses.positives) == 0
    losses.total.backward()
    assert output.offsets.grad is not None
    assert not output.offsets.grad.any()
    assert output.logits.grad is not None
    assert output.logits.grad.any()


@pytest.mark.parametrize(("positives", "expected"), [(18, 91.8), (0, 90.1), (100, 100.0)])
def test_normalizer_is_a_float_mean(positives: int, expected: float) -> None:
    updated = updated_normalizer(torch.tensor(100.0), torch.tensor(positives), 0.9)
    assert updated.dtype == torch.float32
    assert float(updated) == pytest.approx(expected, rel=1e-6)


def test_targets_hold_no_gradient() -> None:
    targets = assign_targets(POINTS, SEGMENTS, LABELS, 3, 1.5)
    assert isinstance(targets, Targets)
    assert not targets.classes.requires_grad
    assert not targets.offsets.requires_grad
