"""The head: shapes, padding, attention against a written-out loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pbd_ray.config import HeadConfig
from pbd_ray.detector.actionformer import ActionFormer, Attention, HeadOutput
from pbd_ray.detector.points import pyramid_points, segments_at, sinusoid_table

CONFIG = HeadConfig(
    channels=16, num_heads=2, levels=3, regression_ranges=((0, 4), (4, 8), (8, 10000)), drop_path=0.0
)
STEPS = 32


def head(config: HeadConfig = CONFIG, scale: float | None = 0.3, classes: int = 5) -> ActionFormer:
    model = ActionFormer(config, input_channels=12, feature_steps=STEPS, num_classes=classes).eval()
    if scale is not None:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=scale)
    return model


def padded_mask(*valid: int) -> Tensor:
    return torch.arange(STEPS)[None] < torch.tensor(valid)[:, None]


def fields(output: HeadOutput) -> tuple[Tensor, Tensor]:
    return output.logits, output.offsets


def test_shapes_and_levels() -> None:
    output = head()(torch.randn(2, 12, STEPS), padded_mask(32, 20))
    assert output.logits.shape == (2, 56, 5)
    assert output.offsets.shape == (2, 56, 2)
    assert output.mask.dtype == torch.bool
    assert output.mask.sum(1).tolist() == [56, 20 + 10 + 5]
    assert (output.offsets >= 0).all()
    assert torch.equal(output.points, pyramid_points(STEPS, CONFIG.regression_ranges))


def test_points_lie_at_multiples_of_the_stride() -> None:
    points = pyramid_points(8, ((0, 4), (4, 10000)))
    expected = [[t, 0, 4, 1] for t in range(8)] + [[t, 4, 10000, 2] for t in range(0, 8, 2)]
    assert points.tolist() == expected


def test_segments_at_points() -> None:
    points = torch.tensor([[4.0, 0, 4, 1], [8.0, 4, 8, 2]])
    offsets = torch.tensor([[[1.0, 2.0], [1.5, 0.5]]])
    assert segments_at(points, offsets).tolist() == [[[3.0, 6.0], [5.0, 9.0]]]


@pytest.mark.parametrize("window", [-1, 8])
def test_padded_features_reach_no_valid_point(window: int) -> None:
    model = head(CONFIG.model_copy(update={"attention_window_steps": window}))
    features, mask = torch.randn(2, 12, STEPS), padded_mask(32, 20)
    changed = torch.where(mask[:, None], features, 100 * torch.randn(2, 12, STEPS))
    with torch.no_grad():
        before, after = model(features, mask), model(changed, mask)
        for a, b in zip(fields(before), fields(after), strict=True):
            assert torch.equal(a, b)
        model.mask_input = False  # the release's fault, so that this test is known to see it
        leaky = model(changed, mask)
    assert not torch.allclose(leaky.logits[1][before.mask[1]], before.logits[1][before.mask[1]])
    assert torch.equal(leaky.logits[0], before.logits[0])


def test_valid_points_do_not_depend_on_the_length_of_padding() -> None:
    """A sequence padded to 32 and the same one in a 16-step head give the same at its valid points."""
    model = head(CONFIG.model_copy(update={"levels": 1, "regression_ranges": ((0, 10000),)}))
    features = torch.randn(1, 12, STEPS)
    with torch.no_grad():
        padded = model(features, padded_mask(14))
        short = model(features[..., :16], padded_mask(14)[:, :16])
    torch.testing.assert_close(padded.logits[:, :14], short.logits[:, :14], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.offsets[:, :14], short.offsets[:, :14], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(-1, 1), (-1, 2), (6, 1), (0, 1), (5, 2)])
def test_attention_equals_a_loop(window: int, stride: int) -> None:
    channels, heads, length = 8, 2, 16
    layer = Attention(channels, heads, window, stride, dropout=0.0).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, channels, length)
    valid = 5
    mask = torch.arange(length // stride)[None] < valid
    with torch.no_grad():
        q, k, v = (
            getattr(layer, n)(getattr(layer, f"{n}_norm")(getattr(layer, f"{n}_conv")(x) * mask[:, None]))[0]
            for n in ("query", "key", "value")
        )
        merged = torch.zeros(channels, length // stride)
        size = channels // heads
        for h in range(heads):
            rows = slice(h * size, (h + 1) * size)
            for i in range(valid):
                keys = [j for j in range(valid) if window < 0 or abs(i - j) <= window // 2]
                scores = torch.tensor([float(q[rows, i] @ k[rows, j]) / math.sqrt(size) for j in keys])
                weights = scores.softmax(0)
                merged[rows, i] = sum(w * v[rows, j] for w, j in zip(weights, keys, strict=True))
        expected = layer.proj(merged[None]) * mask[:, None]
        torch.testing.assert_close(layer(x, mask), expected, rtol=1e-4, atol=1e-5)


def test_wide_window_is_global_attention() -> None:
    features, mask = torch.randn(2, 12, STEPS), padded_mask(32, 20)
    everywhere = head()
    wide = head(CONFIG.model_copy(update={"attention_window_steps": 2 * STEPS}))
    wide.load_state_dict(everywhere.state_dict())
    with torch.no_grad():
        assert torch.equal(everywhere(features, mask).logits, wide(features, mask).logits)


@pytest.mark.parametrize("window", [-1, 4])
def test_a_window_without_video_stays_finite(window: int) -> None:
    model = head(CONFIG.model_copy(update={"attention_window_steps": window})).train()
    output = model(torch.randn(2, 12, STEPS), padded_mask(0, 3))
    (output.logits.sum() + output.offsets.sum()).backward()
    assert all(torch.isfinite(t).all() for t in fields(output))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_every_parameter_gets_a_gradient() -> None:
    """DDP refuses parameters that no output depends on."""
    model = head().train()
    output = model(torch.randn(2, 12, STEPS), padded_mask(32, 20))
    (output.logits.sum() + output.offsets.sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_fresh_head_predicts_the_prior() -> None:
    model = ActionFormer(CONFIG.model_copy(update={"class_prior": 0.05}), 12, STEPS, 5)
    torch.testing.assert_close(model.class_output.bias.sigmoid(), torch.full((5,), 0.05))


def test_position_table_is_scaled_sinusoids_on_valid_steps() -> None:
    config = CONFIG.model_copy(update={"position_table": True, "stem_layers": 0})
    model, mask = head(config), padded_mask(20)
    plain = head(config.model_copy(update={"position_table": False}))
    plain.load_state_dict(model.state_dict())
    features = torch.randn(1, 12, STEPS)
    with torch.no_grad():
        (x, _), *_ = model.pyramid(features, mask)
        (without, _), *_ = plain.pyramid(features, mask)
    for step, channel in ((0, 0), (0, 1), (7, 4), (19, 15), (25, 3)):
        angle = step / 10000 ** (2 * (channel // 2) / 16)
        wave = (math.cos if channel % 2 else math.sin)(angle) / math.sqrt(16)
        added = wave if step < 20 else 0.0
        assert float(x[0, channel, step] - without[0, channel, step]) == pytest.approx(added, abs=1e-5)


def test_sinusoid_table_first_rows() -> None:
    table = sinusoid_table(3, 4)
    expected = [[0, 1, 0, 1], [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)]]
    torch.testing.assert_close(table[:2], torch.tensor(expected))


def test_drop_path_and_dropout_only_in_training() -> None:
    model = head(CONFIG.model_copy(update={"drop_path": 0.5, "dropout": 0.5}))
    features, mask = torch.randn(2, 12, STEPS), padded_mask(32, 32)
    with torch.no_grad():
        assert torch.equal(model(features, mask).logits, model(features, mask).logits)
        model.train()
        assert not torch.equal(model(features, mask).logits, model(features, mask).logits)


def test_loss_normalizer_is_a_saved_float() -> None:
    model = head(scale=None)
    assert model.loss_normalizer.dtype == torch.float32
    assert float(model.state_dict()["loss_normalizer"]) == CONFIG.normalizer_init
