"""Zeros of the hidden activations against a loop over blocks, windows and tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pbd_ray.compression.blocks import Model, to_detector
from pbd_ray.compression.sparsity import measure_sparsity
from pbd_ray.config import DetectorConfig
from pbd_ray.data.dataset import WindowBatch

CPU = torch.device("cpu")


def with_activation(config: DetectorConfig, activation: str) -> DetectorConfig:
    return config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"activation": activation})}
    )


@torch.inference_mode()
def naive(
    model: Model, config: DetectorConfig, batches: list[WindowBatch]
) -> dict[int, tuple[int, int, int]]:
    """Block -> (zeros, negative inputs, elements), one real token after the other."""
    backbone = to_detector(model, config, 4).backbone
    activation = torch.relu if config.backbone.activation == "relu" else torch.nn.functional.gelu
    tubelet, feature_steps = config.backbone.tubelet_frames, config.grid.feature_steps
    counts = dict.fromkeys(backbone.kept_blocks, (0, 0, 0))
    for batch in batches:
        for frames, mask in zip(batch.frames, batch.mask, strict=True):
            tokens = backbone.embed(frames[None])
            places = tokens.shape[1] // backbone.chunk_steps
            for block in backbone.kept_blocks:
                layer = backbone.blocks[str(block)]
                attended = tokens + layer.attn(layer.norm1(tokens))
                before = layer.mlp.fc1(layer.norm2(attended))
                for chunk in range(len(tokens)):
                    for token in range(tokens.shape[1]):
                        first_frame = (chunk * backbone.chunk_steps + token // places) * tubelet
                        if first_frame * feature_steps >= int(mask.sum()) * frames.shape[1]:
                            continue  # padding
                        row = before[chunk, token]
                        seen = (int((activation(row) == 0).sum()), int((row < 0).sum()), len(row))
                        counts[block] = tuple(map(sum, zip(counts[block], seen, strict=True)))  # type: ignore[assignment]
                tokens = backbone.run_block(block, tokens)
    return counts


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_against_a_loop(
    activation: str, config: DetectorConfig, student: Model, make_batch: Callable[..., WindowBatch]
) -> None:
    swapped, batches = with_activation(config, activation), [make_batch(2, 0), make_batch(1, 1)]
    assert not batches[0].mask.all(), "padding is left out"
    found = measure_sparsity(to_detector(student, swapped, 4), batches, "none", CPU)
    counts = naive(student, swapped, batches)
    zeros, negative, elements = map(sum, zip(*counts.values(), strict=True))
    assert (found.elements, found.windows, found.dtype) == (elements, 3, "float32")
    assert found.zeros == pytest.approx(zeros / elements, abs=1e-4)  # sums in another order may round to 0
    assert found.negative == pytest.approx(negative / elements, abs=1e-4)
    by_block = {block: seen[0] / seen[2] for block, seen in counts.items()}
    assert found.zeros_by_block == pytest.approx(by_block, abs=1e-4)
    assert set(found.zeros_by_block) == set(student.kept_blocks)
    assert (found.zeros > 0.2) is (activation == "relu")
    if activation == "relu":
        assert found.zeros == pytest.approx(found.negative, abs=1e-4)


def test_in_the_precision_of_the_forward(
    config: DetectorConfig, student: Model, make_batch: Callable[..., WindowBatch]
) -> None:
    found = measure_sparsity(to_detector(student, config, 4), [make_batch(1)], "bfloat16", CPU)
    assert found.dtype == "bfloat16"


def test_of_nothing(config: DetectorConfig, student: Model) -> None:
    with pytest.raises(ValueError, match="no windows"):
        measure_sparsity(to_detector(student, config, 4), [], "none", CPU)
