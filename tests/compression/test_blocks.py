"""Dropping a block from a model that is a value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pbd_ray.compression.blocks import (
    UNDROPPED,
    Model,
    from_detector,
    to_detector,
    without_block,
    without_gaps,
)
from pbd_ray.config import DetectorConfig
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.detector.detector import Detector

TENSORS_OF_A_BLOCK = {
    "attn.proj.bias", "attn.proj.weight", "attn.q_bias", "attn.qkv.weight", "attn.v_bias",
    "mlp.fc1.bias", "mlp.fc1.weight", "mlp.fc2.bias", "mlp.fc2.weight",
    "norm1.bias", "norm1.weight", "norm2.bias", "norm2.weight",
}  # fmt: skip


@pytest.mark.parametrize(
    ("drops", "kept"),
    [
        ((0,), (1, 2, 3, 4)),
        ((4,), (0, 1, 2, 3)),
        ((2, 0), (1, 3, 4)),
        ((3, 1, 4), (0, 2)),
        ((1, 2, 3, 4), (0,)),
    ],
)
def test_blocks_go_and_the_others_keep_their_index(
    teacher: Model, drops: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    model = teacher
    for block in drops:
        model = without_block(model, block)
    assert model.kept_blocks == kept
    gone = {f"backbone.blocks.{block}.{name}" for block in drops for name in TENSORS_OF_A_BLOCK}
    assert set(teacher.weights) - set(model.weights) == gone
    assert all(model.weights[name] is teacher.weights[name] for name in model.weights)


def test_block_1_is_not_the_beginning_of_block_10() -> None:
    names = [f"backbone.blocks.{index}.norm1.weight" for index in range(12)]
    model = Model(tuple(range(12)), {name: np.zeros(1, np.float32) for name in names})
    assert list(without_block(model, 1).weights) == names[:1] + names[2:]


def test_without_gaps_blocks_are_numbered_from_0() -> None:
    names = {f"backbone.blocks.{index}.norm1.weight": index for index in (0, 3, 10)}
    others = {"backbone.patch_embed.bias": -1, "head.stem.3.norm1.weight": -2}
    weights = {name: np.full(1, value) for name, value in (names | others).items()}
    plain, config = without_gaps(Model((0, 3, 10), weights), DetectorConfig())
    assert plain.kept_blocks == (0, 1, 2) and config.backbone.depth == 3
    found = {name: int(value[0]) for name, value in plain.weights.items()}
    assert found == {f"backbone.blocks.{k}.norm1.weight": v for k, v in enumerate((0, 3, 10))} | others


@pytest.mark.parametrize(
    ("kept", "block", "message"),
    [
        ((0, 2), 1, "block 1 is not among the kept blocks [0, 2]"),
        ((0, 2), UNDROPPED, "block -1 is not among the kept blocks [0, 2]"),
        ((3,), 3, "block 3 is the last block"),
    ],
)
def test_refused(kept: tuple[int, ...], block: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        without_block(Model(kept, {}), block)
    assert str(error.value) == message


def test_round_trip_of_a_detector(
    make_detector: Callable[..., Detector], make_batch: Callable[..., WindowBatch], config: DetectorConfig
) -> None:
    detector, batch = make_detector((0, 3)), make_batch(2)
    detector.head.loss_normalizer.fill_(91.8)
    model = from_detector(detector)
    assert model.kept_blocks == (0, 3)
    again = to_detector(model, config, 4)
    assert not again.training and again.kept_blocks == (0, 3)
    assert float(again.head.loss_normalizer) == np.float32(91.8)
    with torch.inference_mode():
        ours, theirs = (d(batch.frames, batch.mask) for d in (again, detector))
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.offsets, theirs.offsets)
    twice = from_detector(again).weights
    assert twice.keys() == model.weights.keys()
    assert all(np.array_equal(twice[name], value) for name, value in model.weights.items())


def test_nothing_is_shared_with_the_value(
    make_detector: Callable[..., Detector], config: DetectorConfig
) -> None:
    """Read-only arrays make a detector that trains, and training it leaves the value alone."""
    detector = make_detector((1, 2))
    model = from_detector(detector)
    for value in model.weights.values():
        value.flags.writeable = False
    before = {name: value.copy() for name, value in model.weights.items()}
    again = to_detector(model, config, 4)
    with torch.no_grad():
        for parameter in (*detector.parameters(), *again.parameters()):
            parameter.add_(1.0)
    assert all(np.array_equal(model.weights[name], value) for name, value in before.items())


def test_weights_that_do_not_fit_the_kept_blocks(teacher: Model, config: DetectorConfig) -> None:
    with pytest.raises(RuntimeError, match=r"backbone\.blocks\.1"):
        to_detector(Model((0, 2, 3, 4), teacher.weights), config, 4)
