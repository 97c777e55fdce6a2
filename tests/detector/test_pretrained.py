"""Imported weights: the same function after the import, and every key accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from pbd_ray.config import BackboneConfig, DetectorConfig, GridConfig, HeadConfig
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.pretrained import (
    PretrainedError,
    load_dinov2_layout,
    load_opentad,
    resize_patch_kernel,
    to_opentad,
)
from pbd_ray.detector.videomae import PIXEL_MEAN, PIXEL_STD, VideoMAE

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
    report = load_dinov2_layout(backbone, write(model, tmp_path / "w.safetensors"))
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
    report = load_dinov2_layout(backbone, write(model, tmp_path / "w.safetensors"))
    assert {"layernorm.weight", "layernorm.bias"} <= set(report.loaded)
    tokens = torch.randn(2, 20, 24)
    with torch.no_grad():
        torch.testing.assert_close(backbone.norm(tokens), model.layernorm(tokens))


def test_softmax_does_not_see_a_key_bias() -> None:
    query, key, value, bias = torch.randn(4, 2, 3, 50, 8, dtype=torch.float64)
    plain = F.scaled_dot_product_attention(query, key, value)
    shifted = F.scaled_dot_product_attention(query, key + bias[:, :, :1], value)
    torch.testing.assert_close(plain, shifted, rtol=1e-12, atol=1e-12)


def test_a_still_video_embeds_like_its_image(tmp_path: Path) -> None:
    model = small_dinov2()
    backbone = VideoMAE(SMALL, GRID).eval()
    load_dinov2_layout(backbone, write(model, tmp_path / "w.safetensors"))
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (PIXEL_MEAN, PIXEL_STD))
    with torch.no_grad():
        expected = model.embeddings((image - mean) / std)[:, 1:]
        tokens = backbone.embed(image[:, :, None].expand(-1, -1, 8, -1, -1))
    for step in tokens.reshape(4, 16, 24):
        torch.testing.assert_close(step, expected[0], rtol=1e-4, atol=1e-4)


def test_larger_patches_answer_the_resized_image_alike() -> None:
    kernel, patches = torch.randn(5, 3, 14, 14), torch.randn(7, 3, 14, 14)
    resized = F.interpolate(patches, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(
        F.conv2d(resized, resize_patch_kernel(kernel, 16)), F.conv2d(patches, kernel), rtol=1e-3, atol=1e-3
    )
    assert resize_patch_kernel(kernel, 14) is kernel


def test_smaller_patches_keep_the_answer_to_smooth_images() -> None:
    kernel = torch.randn(5, 3, 14, 14)
    row = torch.linspace(-1, 1, 14)
    ramp = (row[:, None] + 0.5 * row).expand(1, 3, 14, 14)
    small = F.interpolate(ramp, size=(8, 8), mode="bicubic", align_corners=False, antialias=True)
    answer, expected = F.conv2d(small, resize_patch_kernel(kernel, 8)), F.conv2d(ramp, kernel)
    assert (answer - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("table", [16, 32, 48])
def test_positions_are_interpolated_and_repeated(tmp_path: Path, table: int) -> None:
    model = small_dinov2()
    backbone = VideoMAE(SMALL.model_copy(update={"position_table_pixels": table}), GRID)
    load_dinov2_layout(backbone, write(model, tmp_path / "w.safetensors"))
    with torch.no_grad():
        own = model.embeddings.interpolate_pos_encoding(
            torch.zeros(1, (table // 8) ** 2 + 1, 24), table, table
        )
    for step in backbone.position_table.reshape(4, -1, 24):
        torch.testing.assert_close(step, own[0, 1:], rtol=1e-4, atol=1e-5)


def test_dropped_blocks_are_ignored_with_a_reason(tmp_path: Path) -> None:
    backbone = VideoMAE(SMALL, GRID, kept_blocks=[0, 2])
    report = load_dinov2_layout(backbone, write(small_dinov2(), tmp_path / "w.safetensors"))
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
        load_dinov2_layout(backbone, write(small_dinov2(), tmp_path / "w.safetensors"))
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
        load_dinov2_layout(
            VideoMAE(SMALL, GRID), write(small_dinov2(), tmp_path / "w.safetensors", **changes)
        )
    assert message in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    backbone = VideoMAE(SMALL, GRID)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    for name, message in (
        ("none.safetensors", "no such file"),
        ("junk.safetensors", "not a safetensors file"),
        ("junk.pth", "cannot be read as weights only"),
    ):
        with pytest.raises(PretrainedError, match=message) as error:
            load_dinov2_layout(backbone, tmp_path / name)
        assert "\n" not in str(error.value)


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
    report = load_dinov2_layout(backbone, path)
    assert set(report.loaded) | set(report.ignored) == set(tensors)
    frames = torch.rand(1, 3, 1, 6, 6).mul(255).repeat_interleave(16, 2)
    frames = F.interpolate(frames, size=(16, 96, 96), mode="trilinear", align_corners=False)
    with torch.no_grad():
        tokens = backbone.embed(frames)
    check_blocks(backbone, model, tokens, atol=2e-3)


TINY = DetectorConfig(
    grid=GridConfig(window_frames=16, feature_steps=16, crop_pixels=16),
    backbone=BackboneConfig(embed_dim=16, depth=3, num_heads=2, position_table_pixels=32),
    head=HeadConfig(channels=8, num_heads=2, levels=2, regression_ranges=((0, 4), (4, 10000))),
)
ROOT = "backbone.model.backbone."


def fresh(kept: list[int] | None = None, unused_norm: bool = False) -> Detector:
    backbone = TINY.backbone.model_copy(update={"unused_norm": unused_norm})
    detector = Detector(TINY.model_copy(update={"backbone": backbone}), 4, kept)
    randomize(detector)
    return detector


def equal(a: Detector, b: Detector) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_opentad_names_are_a_bijection() -> None:
    detector = fresh(unused_norm=True)
    names = to_opentad(detector)
    assert len(names) == len(detector.state_dict())
    assert {n.split(".")[0] for n in names} == {"backbone", "projection", "neck", "rpn_head"}


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
@pytest.mark.parametrize("kept", [None, [0, 2]])
def test_opentad_round_trip(prefix: str, kept: list[int] | None) -> None:
    source, target = fresh(kept), fresh(kept)
    tensors = {prefix + name: tensor.clone() for name, tensor in to_opentad(source).items()}
    report = load_opentad(target, tensors)
    assert equal(source, target)
    assert len(report.loaded) == len(tensors)
    assert report.ignored == {}


def test_opentad_student_from_a_full_file() -> None:
    source, student = fresh(unused_norm=True), fresh([0, 2])
    report = load_opentad(student, to_opentad(source))
    dropped = {k for k in to_opentad(source) if k.startswith(f"{ROOT}blocks.1.")}
    assert dropped | {f"{ROOT}fc_norm.weight", f"{ROOT}fc_norm.bias"} == set(report.ignored)
    assert torch.equal(student.backbone.blocks["2"].norm1.weight, source.backbone.blocks["2"].norm1.weight)


def test_opentad_integer_normalizer_becomes_a_float() -> None:
    tensors = to_opentad(fresh()) | {"rpn_head.loss_normalizer": torch.tensor(250)}
    target = fresh()
    load_opentad(target, tensors)
    assert target.head.loss_normalizer.dtype == torch.float32
    assert float(target.head.loss_normalizer) == 250.0


@pytest.mark.parametrize("layer", ["qkv", "proj"])
def test_opentad_lora_is_merged_unless_told_otherwise(layer: str) -> None:
    source = fresh()
    weight = getattr(source.backbone.blocks["1"].attn, layer).weight.detach()
    a, b = torch.randn(weight.shape[1], 4), torch.randn(4, weight.shape[0])
    prefix = f"{ROOT}blocks.1.attn.lora_{layer}."
    tensors = to_opentad(source) | {f"{prefix}A": a, f"{prefix}B": b}
    merged, plain = fresh(), fresh()
    load_opentad(merged, tensors)
    expected = weight + (a @ b).T
    assert torch.equal(getattr(merged.backbone.blocks["1"].attn, layer).weight, expected)
    report = load_opentad(plain, tensors, merge_lora=False)
    assert equal(plain, source)
    assert set(report.ignored) == {f"{prefix}A", f"{prefix}B"}


def test_opentad_checkpoint_file_prefers_ema(tmp_path: Path) -> None:
    raw, ema, target = fresh(), fresh(), fresh()
    path = tmp_path / "epoch_59.pth"
    states = {
        "state_dict": {f"module.{k}": v for k, v in to_opentad(raw).items()},
        "state_dict_ema": {f"module.{k}": v for k, v in to_opentad(ema).items()},
    }
    torch.save({"epoch": 59, **states}, path)
    load_opentad(target, path)
    assert equal(target, ema)
    load_opentad(target, path, ema=False)
    assert equal(target, raw)
    save_file(to_opentad(raw), tmp_path / "w.safetensors")
    load_opentad(target, tmp_path / "w.safetensors")
    assert equal(target, raw)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("exploded"),)


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, tmp_path / "evil.pth")
    with pytest.raises(PretrainedError, match="cannot be read as weights only") as error:
        load_opentad(fresh(), tmp_path / "evil.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{ROOT}blocks.1.norm1.bias": None}, f"tensor '{ROOT}blocks.1.norm1.bias' is missing"),
        ({f"{ROOT}blocks.1.adapter.down.weight": torch.zeros(2)}, "unknown tensor"),
        ({f"{ROOT}blocks.1.norm1.bias": torch.zeros(3)}, "has shape [3], the detector needs [16]"),
        ({f"{ROOT}blocks.1.attn.lora_qkv.A": torch.zeros(16, 4)}, "lora_qkv.B' is missing"),
        (
            {
                f"{ROOT}blocks.1.attn.lora_qkv.A": torch.zeros(16, 4),
                f"{ROOT}blocks.1.attn.lora_qkv.B": torch.zeros(4, 16),
            },
            "LoRA factors of 'backbone.blocks.1.attn.qkv.weight' have shapes [16, 4], [4, 16]",
        ),
    ],
)
def test_opentad_keys_that_do_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {k: v for k, v in (to_opentad(fresh()) | change).items() if v is not None}
    target = fresh()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(PretrainedError) as error:
        load_opentad(target, tensors)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items()), "half-loaded"


def test_opentad_file_that_holds_no_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "meta.pth")
    with pytest.raises(PretrainedError, match="expected a mapping of names to tensors"):
        load_opentad(fresh(), tmp_path / "meta.pth")
