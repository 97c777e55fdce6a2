"""Image ViTs as the start of a backbone: transformers' DINOv2 and timm's ViTs, block for block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    VideoMAEConfig,
    VideoMAEModel,
)

from pbd_ray.config import BackboneConfig, GridConfig
from pbd_ray.detector.pretrained import PretrainedError, WeightFile
from pbd_ray.detector.videomae import PIXEL_MEAN, PIXEL_STD, VideoMAE
from pbd_ray.detector.vit_weights import load_backbone

GRID = GridConfig(window_frames=16, feature_steps=16, crop_pixels=32)
SMALL = BackboneConfig(
    embed_dim=24, depth=3, num_heads=2, patch_pixels=8, chunk_frames=8, position_table_pixels=32
)


def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)


def small_dinov2(patch: int = 8, grid: int = 4) -> Dinov2Model:
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=patch * grid,
            patch_size=patch,
            hidden_act="gelu",
        )
    ).eval()
    randomize(model)
    return model


def write(model: Dinov2Model, path: Path, **changes: Tensor | None) -> Path:
    state = model.state_dict()
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    config = {"num_attention_heads": model.config.num_attention_heads}
    save_file(state, path, metadata={"config": json.dumps(config)})
    return path


def run_layers(model: Dinov2Model, tokens: Tensor) -> list[Tensor]:
    """The ViT's own layers on given tokens: no class token, no final norm."""
    outputs = []
    for layer in model.encoder.layer:
        tokens = layer(tokens)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        outputs.append(tokens)
    return outputs


def check_blocks(backbone: VideoMAE, model: Dinov2Model, tokens: Tensor, atol: float) -> None:
    with torch.no_grad():
        for index, expected in enumerate(run_layers(model, tokens)):
            tokens = backbone.run_block(index, tokens)
            torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=atol, msg=f"block {index}")


def test_blocks_equal_the_image_vit(tmp_path: Path) -> None:
    """Folded layer scale and the missing key bias change nothing."""
    model = small_dinov2()
    backbone = VideoMAE(SMALL, GRID).eval()
    report = load_backbone(backbone, write(model, tmp_path / "w.safetensors"))
    check_blocks(backbone, model, torch.randn(2, 20, 24), atol=1e-4)
    assert set(report.loaded) | set(report.ignored) == set(model.state_dict())
    assert not set(report.loaded) & set(report.ignored)
    keys = {f"encoder.layer.{i}.attention.k_proj.bias" for i in range(3)}
    others = {"embeddings.cls_token", "embeddings.mask_token", "layernorm.weight", "layernorm.bias"}
    assert set(report.ignored) == keys | others


def test_final_norm_is_kept_where_the_backbone_has_one(tmp_path: Path) -> None:
    model = small_dinov2()
    torch.nn.init.normal_(model.layernorm.weight)
    backbone = VideoMAE(SMALL.model_copy(update={"final_norm": True}), GRID).eval()
    report = load_backbone(backbone, write(model, tmp_path / "w.safetensors"))
    assert {"layernorm.weight", "layernorm.bias"} <= set(report.loaded)
    tokens = torch.randn(2, 20, 24)
    with torch.no_grad():
        torch.testing.assert_close(backbone.norm(tokens), model.layernorm(tokens))


def test_a_still_video_embeds_like_its_image(tmp_path: Path) -> None:
    model = small_dinov2()
    backbone = VideoMAE(SMALL, GRID).eval()
    load_backbone(backbone, write(model, tmp_path / "w.safetensors"))
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (PIXEL_MEAN, PIXEL_STD))
    with torch.no_grad():
        expected = model.embeddings((image - mean) / std)[:, 1:]
        tokens = backbone.embed(image[:, :, None].expand(-1, -1, 8, -1, -1))
    for step in tokens.reshape(4, 16, 24):
        torch.testing.assert_close(step, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("table", [16, 32, 48])
def test_positions_are_interpolated_and_repeated(tmp_path: Path, table: int) -> None:
    model = small_dinov2()
    backbone = VideoMAE(SMALL.model_copy(update={"position_table_pixels": table}), GRID)
    load_backbone(backbone, write(model, tmp_path / "w.safetensors"))
    with torch.no_grad():
        own = model.embeddings.interpolate_pos_encoding(
            torch.zeros(1, (table // 8) ** 2 + 1, 24), table, table
        )
    for step in backbone.position_table.reshape(4, -1, 24):
        torch.testing.assert_close(step, own[0, 1:], rtol=1e-4, atol=1e-5)


def test_dropped_blocks_are_ignored_with_a_reason(tmp_path: Path) -> None:
    backbone = VideoMAE(SMALL, GRID, kept_blocks=[0, 2])
    report = load_backbone(backbone, write(small_dinov2(), tmp_path / "w.safetensors"))
    reasons = {r for k, r in report.ignored.items() if k.startswith("encoder.layer.1.")}
    assert reasons == {"block 1 is dropped"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 4}, "has 3 blocks, backbone.depth is 4"),
        ({"embed_dim": 32}, "has width 24, backbone.embed_dim is 32"),
        ({"num_heads": 3}, "has 2 heads, backbone.num_heads is 3"),
        ({"mlp_ratio": 2.0}, "has shape [96, 24], the detector needs [48, 24]"),
        ({"activation": "relu"}, "weights need backbone.activation gelu, got relu"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    backbone = VideoMAE(SMALL.model_copy(update=settings), GRID)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(PretrainedError) as error:
        load_backbone(backbone, write(small_dinov2(), tmp_path / "w.safetensors"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items()), "half-loaded"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder__layer__1__norm2__bias": None}, "tensor 'encoder.layer.1.norm2.bias' is missing"),
        ({"register_tokens": torch.zeros(4)}, "unknown tensor 'register_tokens'"),
        ({"encoder__layer__1__norm2__bias": torch.full((24,), torch.nan)}, "not finite"),
        ({"embeddings__position_embeddings": torch.zeros(1, 20, 24)}, "19 positions are not a square"),
    ],
)
def test_keys_that_do_not_fit(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(PretrainedError) as error:
        load_backbone(VideoMAE(SMALL, GRID), write(small_dinov2(), tmp_path / "w.safetensors", **changes))
    assert message in str(error.value)


def test_real_image_weights(shared: Path) -> None:
    """The real ViT-S/14: twelve blocks alike in transformers and here."""
    path = shared / "weights" / "vit_s14_dinov2_layout_fp16.safetensors"
    tensors = load_file(path)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    grid = GridConfig(window_frames=16, feature_steps=16, crop_pixels=96)
    backbone = VideoMAE(BackboneConfig(position_table_pixels=96), grid).eval()
    report = load_backbone(backbone, path)
    assert set(report.loaded) | set(report.ignored) == set(tensors)
    frames = torch.rand(1, 3, 1, 6, 6).mul(255).repeat_interleave(16, 2)
    frames = F.interpolate(frames, size=(16, 96, 96), mode="trilinear", align_corners=False)
    with torch.no_grad():
        tokens = backbone.embed(frames)
    check_blocks(backbone, model, tokens, atol=2e-3)


def test_the_hubs_older_names_of_dinov2() -> None:
    state = small_dinov2().state_dict()
    older = {}
    for key, value in state.items():
        for new, old in (
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
        ):
            key = key.replace(new, old)
        older[f"dinov2.{key}"] = value
    new_names, old_names = VideoMAE(SMALL, GRID), VideoMAE(SMALL, GRID)
    load_backbone(new_names, state)
    load_backbone(old_names, older | {"classifier.weight": torch.zeros(2, 48)})
    assert same(new_names, old_names)


def test_registers_have_no_positions() -> None:
    config = Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = Dinov2WithRegistersModel(config).eval()
    randomize(model)
    backbone = VideoMAE(SMALL, GRID).eval()
    report = load_backbone(backbone, model.state_dict())
    assert "embeddings.register_tokens" in report.ignored
    expected = model.embeddings.position_embeddings[0, 1:]
    torch.testing.assert_close(backbone.position_table[0, :16], expected)


def same(a: VideoMAE, b: VideoMAE) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32}


def timm_vit(name: str, **changes: object) -> VisionTransformer:
    model = timm.create_model(name, pretrained=False, **changes).eval()
    randomize_gently(model)
    return model


def randomize_gently(model: nn.Module) -> None:
    """Every parameter away from its start, so that none can be forgotten; activations stay small."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.05)


def backbone_like(model: VisionTransformer, **changes: object) -> VideoMAE:
    patch, pixels = model.patch_embed.patch_size[0], model.patch_embed.img_size[0]
    config = BackboneConfig(
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        patch_pixels=patch,
        position_table_pixels=pixels,
    ).model_copy(update=changes)
    return VideoMAE(config, GridConfig(window_frames=16, feature_steps=16, crop_pixels=pixels)).eval()


def still_video_tokens(backbone: VideoMAE, image: Tensor) -> Tensor:
    """(1, 3, H, W) -> (steps, N, d): one chunk that shows the image all the time, after all blocks."""
    with torch.no_grad():
        tokens = backbone.embed(image[:, :, None].expand(-1, -1, 16, -1, -1))
        for index in backbone.kept_blocks:
            tokens = backbone.run_block(index, tokens)
    return tokens.reshape(backbone.chunk_steps, -1, tokens.shape[-1])


def timm_patch_tokens(
    model: VisionTransformer,
    image: Tensor,
    mean: tuple[float, ...] = PIXEL_MEAN,
    std: tuple[float, ...] = PIXEL_STD,
) -> Tensor:
    """(1, N, d): timm's embedding, positions and blocks on the patches alone, without other tokens."""
    pixels = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        tokens = model.patch_embed(pixels)
        tokens = tokens + model.pos_embed[:, model.pos_embed.shape[1] - tokens.shape[1] :]
        tokens = model.blocks(tokens)
    return tokens


IMAGE_VITS = {
    "true S shape": ("vit_small_patch16_224", {"img_size": 64}),
    "true S shape, 14 pixels, layer scale, registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "class token": ("vit_small_patch16_224", TINY),
    "layer scale": ("deit3_small_patch16_224", TINY),
    "registers with positions": ("vit_small_patch16_224", TINY | {"reg_tokens": 4}),
    "registers without": ("vit_small_patch14_reg4_dinov2", TINY),
    "no class token": ("vit_small_patch16_224", TINY | {"class_token": False, "global_pool": "avg"}),
    "two tokens and heads": ("deit_small_distilled_patch16_224", TINY),
    "layer scale, no biases": ("vit_medium_patch16_gap_240", TINY),
}


@pytest.mark.parametrize("variant", IMAGE_VITS)
def test_a_still_video_is_the_image_to_timm(variant: str) -> None:
    """Copies of a token get equal attention: every time step ends as timm's blocks leave the patches."""
    torch.manual_seed(0)
    name, changes = IMAGE_VITS[variant]
    model = timm_vit(name, **changes)
    backbone = backbone_like(model)
    report = load_backbone(backbone, model.state_dict())
    assert set(report.loaded) | set(report.ignored) == set(model.state_dict())
    image = torch.randint(0, 256, (1, 3, *model.patch_embed.img_size), dtype=torch.uint8)
    expected = timm_patch_tokens(model, image)[0]
    for step in still_video_tokens(backbone, image):
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)


def test_pixels_normalised_otherwise_are_folded_into_the_kernels(tmp_path: Path) -> None:
    """Most of timm's ViTs want pixels between -1 and 1; the config.json beside the file says so."""
    model = timm_vit("vit_small_patch16_224", **TINY)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_small_patch16_224",
        "model_args": TINY,
        "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = backbone_like(model)
    load_backbone(backbone, tmp_path / "model.safetensors")
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    expected = timm_patch_tokens(model, image, (127.5, 102.0, 76.5), (127.5, 153.0, 178.5))[0]
    torch.testing.assert_close(still_video_tokens(backbone, image)[3], expected, rtol=1e-4, atol=1e-4)


def test_final_norm_of_timm() -> None:
    """`norm` sees tokens and is kept; `fc_norm` sees their mean and is not: ours starts plain."""
    image = timm_vit("vit_small_patch16_224", **TINY)
    backbone = backbone_like(image, final_norm=True)
    load_backbone(backbone, image.state_dict())
    assert torch.equal(backbone.norm.weight, image.norm.weight)
    pooled = timm_vit("vit_small_patch16_224", **TINY, class_token=False, global_pool="avg")
    report = load_backbone(backbone_like(pooled, final_norm=True), pooled.state_dict())
    assert report.ignored["fc_norm.weight"].startswith("a norm after the mean over tokens")
    neither = {key: value for key, value in image.state_dict().items() if not key.startswith("norm.")}
    with pytest.raises(PretrainedError, match=r"tensor 'norm\.weight' is missing"):
        load_backbone(backbone_like(image, final_norm=True), neither)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit_base_patch16_clip_224", TINY, "tensor 'norm_pre.bias' is of a norm before the blocks"),
        ("vit_small_patch16_224", TINY | {"qk_norm": True}, "k_norm.bias' is of norms of query and key"),
        ("vit_small_patch16_18x2_224", TINY, "attns.0.attn.proj.bias' is of parallel blocks"),
        ("vit_base_patch16_rope_mixed_224", TINY, "tensor 'rope.freqs' is of rotary positions"),
        ("vit_base_patch16_rope_224", TINY, "tensor 'pos_embed' is missing"),
        ("vit_relpos_small_patch16_224", TINY, "is of relative positions"),
        ("vit_giant_patch14_dinov2", TINY, "tensor 'blocks.0.mlp.fc1.weight' is of a gated MLP (SwiGLU)"),
        ("vit_base_patch16_rpn_224", TINY, "has neither attn.qkv.bias nor layer scale"),
        ("vit_base_r26_s32_224", {"embed_dim": 24, "depth": 3, "num_heads": 2}, "its patch embedding has"),
        ("beit_base_patch16_224", TINY, "is of relative positions"),
        ("eva_giant_patch14_224", TINY | {"mlp_ratio": 4.0}, "unknown tensor 'blocks.0.attn.q_bias'"),
        ("resnet18", {}, "has 0 patch embeddings"),
    ],
)
def test_other_architectures_are_refused(name: str, changes: dict[str, object], message: str) -> None:
    model = timm.create_model(name, pretrained=False, **changes)
    backbone = VideoMAE(SMALL, GRID)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(PretrainedError) as error:
        load_backbone(backbone, model.state_dict())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items()), "half-loaded"


def test_a_whole_detector_is_no_backbone() -> None:
    tensors = {"module.backbone.model.backbone.patch_embed.projection.weight": torch.zeros(24, 3, 2, 8, 8)}
    with pytest.raises(PretrainedError, match=r"is a whole detector: name it as experiment\.teacher\.source"):
        load_backbone(VideoMAE(SMALL, GRID), tensors)


SMALL_VIDEOMAE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}
SMALL_VIDEOMAE |= {"patch_size": 8, "image_size": 32, "num_frames": 8, "use_mean_pooling": False}


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_spoiled_files_are_refused_or_load_the_same(data: st.DataObject) -> None:
    """A tensor removed, renamed or reshaped: an error of one line, or not a bit of a difference."""
    torch.manual_seed(0)
    model: nn.Module
    layout = data.draw(st.sampled_from(["dinov2", "timm", "videomae"]))
    if layout == "dinov2":
        model = small_dinov2()
    elif layout == "timm":
        model = timm_vit("deit3_small_patch16_224", **TINY)
    else:
        model = VideoMAEModel(VideoMAEConfig(**SMALL_VIDEOMAE))
    state, facts = model.state_dict(), {"image_size": 32, "num_frames": 8}
    config = SMALL.model_copy(update={"final_norm": True})
    whole, backbone = VideoMAE(config, GRID), VideoMAE(config, GRID)
    load_backbone(whole, WeightFile("whole", state, facts))
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=2, unique=True)):
        value = state.pop(key)
        change = data.draw(st.sampled_from(["remove", "rename", "prefix", "flatten", "grow", "scalar"]))
        if change in ("rename", "prefix"):
            state[f"{key}x" if change == "rename" else f"module.{key}"] = value
        elif change != "remove":
            shapes = {"flatten": value.flatten(), "grow": torch.cat([value, value]), "scalar": value.sum()}
            state[key] = shapes[change]
    try:
        load_backbone(backbone, WeightFile("spoiled", state, facts))
        problem = None
    except PretrainedError as error:
        problem = str(error)
    assert same(backbone, whole) if problem is None else problem.startswith("spoiled: ")
    assert "\n" not in (problem or "")
