"""The backbone: against transformers' VideoMAE, and its own promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEModel

from pbd_ray.config import BackboneConfig, GridConfig
from pbd_ray.detector.videomae import PIXEL_MEAN, PIXEL_STD, VideoMAE

GRID = GridConfig(window_frames=16, feature_steps=16, crop_pixels=32)
CONFIG = BackboneConfig(
    embed_dim=32,
    depth=4,
    num_heads=2,
    patch_pixels=8,
    chunk_frames=8,
    position_table_pixels=32,
    drop_path=0.3,
)


def frames_of(batch: int = 2, length: int = 16, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (batch, 3, length, side, side), dtype=torch.uint8)


def randomize(module: nn.Module, scale: float = 0.2) -> None:
    """Weights large enough that every part shows in the output, biases included."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=scale)


def transformers_twin(model: VideoMAE) -> VideoMAEModel:
    """transformers' VideoMAE with our weights."""
    config = model.config
    twin = VideoMAEModel(
        VideoMAEConfig(
            image_size=config.position_table_pixels,
            patch_size=config.patch_pixels,
            num_frames=config.chunk_frames,
            tubelet_size=config.tubelet_frames,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=int(config.embed_dim * config.mlp_ratio),
            hidden_act=config.activation,
            layer_norm_eps=1e-6,
            qkv_bias=True,
            use_mean_pooling=True,  # no final norm
        )
    ).eval()
    ours = model.state_dict()
    state = {
        f"embeddings.patch_embeddings.projection.{p}": ours[f"patch_embed.{p}"] for p in ("weight", "bias")
    }
    renamed = {
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    }
    for index in range(config.depth):
        theirs, mine = f"encoder.layer.{index}.", f"blocks.{index}."
        for their_name, my_name in renamed.items():
            for p in ("weight", "bias"):
                state[f"{theirs}{their_name}.{p}"] = ours[f"{mine}{my_name}.{p}"]
        attention = f"{theirs}attention.attention."
        weights = zip(("query", "key", "value"), ours[f"{mine}attn.qkv.weight"].chunk(3), strict=True)
        state |= {f"{attention}{n}.weight": w for n, w in weights}
        state |= {f"{attention}{n}.bias": ours[f"{mine}attn.{n[0]}_bias"] for n in ("query", "value")}
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_every_block_equals_transformers(activation: str) -> None:
    model = VideoMAE(CONFIG.model_copy(update={"activation": activation}), GRID).eval()
    randomize(model)
    frames = frames_of()
    pixels = frames.float().sub(torch.tensor(PIXEL_MEAN).view(3, 1, 1, 1))
    pixels = pixels.div(torch.tensor(PIXEL_STD).view(3, 1, 1, 1))
    chunks = torch.stack([pixels[b, :, s : s + 8] for b in range(2) for s in (0, 8)])
    with torch.no_grad():
        theirs = transformers_twin(model)(chunks.transpose(1, 2), output_hidden_states=True).hidden_states
        tokens = model.embed(frames)
        torch.testing.assert_close(tokens, theirs[0], rtol=1e-4, atol=1e-5)
        for index in range(CONFIG.depth):
            tokens = model.run_block(index, tokens)
            torch.testing.assert_close(tokens, theirs[index + 1], rtol=1e-4, atol=1e-4)


def test_pool_is_mean_over_space_then_stretch() -> None:
    model = VideoMAE(CONFIG, GRID)
    frames = frames_of()
    tokens = torch.randn_like(model.embed(frames))
    by_hand = torch.zeros(2, 32, 8)
    for sample in range(2):
        for step in range(8):
            chunk, inside = divmod(step, 4)
            by_hand[sample, :, step] = tokens[2 * sample + chunk, inside * 16 : inside * 16 + 16].mean(0)
    expected = F.interpolate(by_hand, size=16, mode="linear", align_corners=False)
    torch.testing.assert_close(model.pool(tokens, 2), expected)


def test_forward_is_embed_blocks_pool() -> None:
    model = VideoMAE(CONFIG, GRID).eval()
    frames = frames_of()
    with torch.no_grad():
        tokens = model.embed(frames)
        for index in model.kept_blocks:
            tokens = model.run_block(index, tokens)
        assert torch.equal(model(frames), model.pool(tokens, 2))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (48, 48), (24, 40)])
def test_any_crop_of_whole_patches(height: int, width: int) -> None:
    model = VideoMAE(CONFIG, GRID).eval()
    frames = torch.randint(0, 256, (1, 3, 16, height, width), dtype=torch.uint8)
    with torch.no_grad():
        assert model(frames).shape == (1, 32, 16)
    positions = model.positions(height // 8, width // 8)
    assert positions.shape == (1, 4 * (height // 8) * (width // 8), 32)
    assert (positions is model.position_table) == (height == width == 32)


def test_position_interpolation_keeps_time_apart() -> None:
    """A table that is constant over each frame stays so on every grid."""
    model = VideoMAE(CONFIG, GRID)
    level = torch.arange(4.0).repeat_interleave(16)[None, :, None].expand(1, 64, 32)
    model.position_table.copy_(level)
    expected = torch.arange(4.0).repeat_interleave(6)
    torch.testing.assert_close(model.positions(2, 3)[0, :, 5], expected)


def test_uint8_and_float_frames_agree() -> None:
    model = VideoMAE(CONFIG, GRID)
    frames = frames_of()
    assert torch.equal(model.embed(frames), model.embed(frames.float()))


def test_attention_stays_inside_a_chunk() -> None:
    model = VideoMAE(CONFIG, GRID).eval()
    randomize(model)
    frames = frames_of(batch=1)
    changed = frames.clone()
    changed[:, :, 8:] = 255 - changed[:, :, 8:]
    with torch.no_grad():
        before = model.run_block(0, model.embed(frames))
        after = model.run_block(0, model.embed(changed))
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_dropped_block_is_the_identity_and_indices_stay() -> None:
    full = VideoMAE(CONFIG, GRID).eval()
    randomize(full)
    student = VideoMAE(CONFIG, GRID, kept_blocks=[0, 2, 3]).eval()
    assert student.kept_blocks == (0, 2, 3)
    student.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("blocks.1.")})
    frames = frames_of()
    with torch.no_grad():
        tokens = full.embed(frames)
        for index in (0, 2, 3):
            tokens = full.run_block(index, tokens)
        assert torch.equal(student(frames), full.pool(tokens, 2))


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [-1, 2], [0, 4]])
def test_bad_kept_blocks(kept: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending original indices of 4 blocks") as error:
        VideoMAE(CONFIG, GRID, kept_blocks=kept)
    assert "\n" not in str(error.value)


def test_drop_path_follows_original_indices() -> None:
    def rates(model: VideoMAE) -> dict[str, float]:
        paths = {i: b.drop_path2 for i, b in model.blocks.items()}
        return {i: p.drop_prob if isinstance(p, DropPath) else 0.0 for i, p in paths.items()}

    assert rates(VideoMAE(CONFIG, GRID)) == pytest.approx({"0": 0.0, "1": 0.1, "2": 0.2, "3": 0.3})
    assert rates(VideoMAE(CONFIG, GRID, [1, 3])) == pytest.approx({"1": 0.1, "3": 0.3})


def test_key_bias_is_zero_and_no_parameter() -> None:
    model = VideoMAE(CONFIG, GRID)
    biases = {n for n, _ in model.blocks["0"].attn.named_parameters() if n.endswith("bias")}
    assert biases == {"q_bias", "v_bias", "proj.bias"}
    assert isinstance(model.blocks["0"].attn.qkv, nn.Linear)
    assert model.blocks["0"].attn.qkv.bias is None


def test_checkpointing_changes_no_number() -> None:
    frames = frames_of()
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = VideoMAE(CONFIG, GRID).train()
        model.checkpointing = checkpointing
        torch.manual_seed(4)  # drop path is live: the recomputation must draw the same paths
        output = model(frames)
        output.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        assert all(g is not None for g in gradients.values())
        results.append((output, gradients))
    (plain, plain_gradients), (recomputed, gradients) = results
    assert torch.equal(plain, recomputed)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_unused_norm_is_carried_and_never_used() -> None:
    config = CONFIG.model_copy(update={"unused_norm": True})
    torch.manual_seed(0)
    with_norm = VideoMAE(config, GRID).eval()
    torch.manual_seed(0)
    without = VideoMAE(CONFIG, GRID).eval()
    count = [sum(p.numel() for p in m.parameters()) for m in (with_norm, without)]
    assert count[0] - count[1] == 2 * CONFIG.embed_dim
    nn.init.constant_(with_norm.fc_norm.weight, float("nan"))
    frames = frames_of()
    with torch.no_grad():
        assert torch.equal(with_norm(frames), without(frames))


def test_final_norm_comes_before_the_mean_over_space() -> None:
    torch.manual_seed(0)
    model = VideoMAE(CONFIG.model_copy(update={"final_norm": True}), GRID).eval()
    nn.init.normal_(model.norm.weight)
    tokens = torch.randn(3, model.chunk_steps * 4, CONFIG.embed_dim)
    without = VideoMAE(CONFIG, GRID)
    with torch.no_grad():
        assert torch.equal(model.pool(tokens, 3), without.pool(model.norm(tokens), 3))


def test_state_holds_the_position_table_and_no_pixel_constants() -> None:
    buffers = set(VideoMAE(CONFIG, GRID).state_dict()) - {
        n for n, _ in VideoMAE(CONFIG, GRID).named_parameters()
    }
    assert buffers == {"position_table"}
