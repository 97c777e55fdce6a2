"""OpenTAD detectors: a round trip of every tensor, and every key accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pbd_ray.config import BackboneConfig, DetectorConfig, GridConfig, HeadConfig
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.opentad import ROOT, load_opentad, to_opentad
from pbd_ray.detector.pretrained import PretrainedError

TINY = DetectorConfig(
    grid=GridConfig(window_frames=16, feature_steps=16, crop_pixels=16),
    backbone=BackboneConfig(embed_dim=16, depth=3, num_heads=2, position_table_pixels=32),
    head=HeadConfig(channels=8, num_heads=2, levels=2, regression_ranges=((0, 4), (4, 10000))),
)


def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{ROOT}blocks.1.norm1.bias": None}, f"tensor '{ROOT}blocks.1.norm1.bias' is missing"),
        ({f"{ROOT}blocks.1.attn.extra": torch.zeros(2)}, "unknown tensor"),
        ({f"{ROOT}blocks.1.adapter.down_proj.weight": torch.zeros(2)}, "is of an AdaTAD adapter"),
        ({f"module.{ROOT}blocks.1.norm1.bias": torch.zeros(16)}, "with and without 'module.'"),
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
