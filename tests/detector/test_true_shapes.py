"""The shipped architectures at their true sizes: shapes without numbers, and a whole window's proposals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pbd_ray.config import load_recipe
from pbd_ray.data.annotations import Video
from pbd_ray.data.windows import inference_windows
from pbd_ray.detector.detector import Detector, DetectorOutput
from pbd_ray.detector.points import pyramid_points
from pbd_ray.detector.postprocess import decode


@pytest.mark.parametrize(
    ("recipe", "classes", "dim", "depth", "heads", "steps", "points"),
    [
        ("thumos14_videomae_s", 20, 384, 12, 6, 768, 1512),
        ("thumos14_videomae_l", 20, 1024, 24, 16, 768, 1512),
        ("activitynet_videomae_s", 1, 384, 12, 6, 192, 378),
    ],
)
def test_shapes_of_a_window(
    recipe: str, classes: int, dim: int, depth: int, heads: int, steps: int, points: int
) -> None:
    """768 frames of 160x160: 48 chunks of 8x10x10 tokens, 384 steps stretched to the grid, 6 levels."""
    config = load_recipe(recipe).experiment.detector
    with torch.device("meta"):
        detector = Detector(config, classes).eval().to("meta")  # tables are made on the CPU
        frames = torch.empty(1, 3, 768, 160, 160, dtype=torch.uint8)
        mask = torch.ones(1, steps, dtype=torch.bool)
        backbone = detector.backbone
        assert backbone.position_table.shape == (1, 8 * 14 * 14, dim)
        tokens = backbone.embed(frames)
        assert tokens.shape == (48, 800, dim)
        assert detector.kept_blocks == tuple(range(depth))
        assert {block.attn.num_heads for block in backbone.blocks.values()} == {heads}
        assert {block.mlp.fc1.weight.shape for block in backbone.blocks.values()} == {(4 * dim, dim)}
        assert backbone.run_block(0, tokens).shape == tokens.shape
        assert backbone.pool(tokens, 1).shape == (1, dim, steps)
        output = detector.head_output(tokens, mask, {})
    assert output.logits.shape == (1, points, classes)
    assert output.offsets.shape == (1, points, 2)
    assert len(output.points) == points == sum(steps >> level for level in range(6))


def test_a_window_keeps_its_best_2000_over_all_levels_and_classes() -> None:
    """Not so many a level or a class: here half of the places go to two classes and most to level 0."""
    config = load_recipe("thumos14_videomae_s").experiment.detector
    rng = np.random.default_rng(0)
    points = pyramid_points(768, config.head.regression_ranges)
    logits = rng.normal(-4, 1, (len(points), 20))
    logits[:, [3, 7]] += 2
    logits[points[:, 3].numpy() == 1] += 0.5
    # The same order, far enough apart to differ as float32 probabilities.
    logits = np.linspace(-6.5, 1.0, logits.size)[logits.ravel().argsort().argsort()].reshape(logits.shape)
    mask = np.arange(len(points)) % 768 < 700
    output = DetectorOutput(
        torch.from_numpy(logits[None]).float(),
        torch.ones(1, len(points), 2),
        torch.from_numpy(mask[None]),
        points,
    )
    video = Video("v", "v.mp4", "test", 102.4, 30.0, 3072, np.zeros((0, 2)), np.zeros(0, np.int32))
    (found,) = decode(output, inference_windows(video, config.grid), config.postprocess)

    eligible = [(-logits[p, c], p, c) for p in range(len(points)) if mask[p] for c in range(20)]
    best = sorted(eligible)[:2000]
    assert len(found.scores) == 2000 and best[-1][0] < -np.log(0.001 / 0.999)
    assert found.labels.tolist() == [c for *_, c in best]
    t, stride = points[[p for _, p, _ in best]][:, [0, 3]].numpy().T
    np.testing.assert_array_equal(found.segments_steps, np.stack([t - stride, t + stride], axis=1))
    assert np.isin(found.labels, [3, 7]).mean() > 0.4 and (stride == 1).mean() > 0.5
    assert {1, 2, 4, 8, 16} <= set(stride.tolist())
