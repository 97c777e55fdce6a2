"""Formats for other programs: what they compute, the names they use, what they cannot hold."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pbd_ray.compression.blocks import from_detector, to_detector, without_gaps
from pbd_ray.config import BackboneConfig, DetectorConfig, GridConfig, HeadConfig, UserError
from pbd_ray.detector.bundle import Bundle
from pbd_ray.detector.detector import Detector, DetectorOutput
from pbd_ray.detector.export.formats import FORMATS
from pbd_ray.detector.export.opentad_config import opentad_config
from pbd_ray.detector.opentad import ROOT

CLASSES = ("Jump", "Rün", "a, b")
TINY = DetectorConfig(
    grid=GridConfig(window_frames=32, feature_steps=16, crop_pixels=16),
    backbone=BackboneConfig(embed_dim=16, depth=4, num_heads=2, position_table_pixels=32),
    head=HeadConfig(
        channels=8,
        num_heads=2,
        embedding_layers=1,
        stem_layers=1,
        head_layers=1,
        levels=2,
        drop_path=0.0,
        regression_ranges=((0, 4), (4, 10000)),
    ),
)
SMALL_VIDEOMAE = DetectorConfig(
    grid=GridConfig(window_frames=32, feature_steps=32, crop_pixels=32),
    backbone=BackboneConfig(unused_norm=True, position_table_pixels=64),
    head=HeadConfig(channels=64),
)
"""VideoMAE-S under the head of THUMOS14, but for its width and the size of window and table."""
KEPT = {"tiny": (0, 2), "final norm": (1,), "VideoMAE-S": (0, 1, 2, 4, 5, 7, 8, 9, 11)}
CONFIGS = {
    "tiny": TINY,
    "final norm": TINY.model_copy(update={"backbone": TINY.backbone.model_copy(update={"final_norm": True})}),
    "VideoMAE-S": SMALL_VIDEOMAE,
}


def changed(section: str, **values: object) -> DetectorConfig:
    return TINY.model_copy(update={section: getattr(TINY, section).model_copy(update=values)})


def detector_of(config: DetectorConfig, kept: tuple[int, ...]) -> Detector:
    torch.manual_seed(0)
    detector = Detector(config, len(CLASSES), kept).eval()
    for parameter in detector.parameters():  # none at its start, where one that is forgotten would not show
        parameter.data += 0.05 * torch.randn_like(parameter)
    return detector


def plain_bundle(detector: Detector) -> Bundle:
    model, config = without_gaps(from_detector(detector), detector.config)
    return Bundle(to_detector(model, config, len(CLASSES)), config, CLASSES, model.kept_blocks, {})


def windows(config: DetectorConfig, count: int) -> tuple[Tensor, Tensor]:
    grid = config.grid
    frames = torch.randint(0, 256, (count, 3, grid.window_frames, grid.crop_pixels, grid.crop_pixels))
    mask = torch.ones(count, grid.feature_steps, dtype=torch.bool)
    mask[-1, 5:] = False
    return frames.to(torch.uint8), mask


def close(actual: DetectorOutput, expected: DetectorOutput, error: float) -> None:
    for name in ("logits", "offsets"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=error)
    assert torch.equal(actual.mask, expected.mask)
    assert torch.equal(actual.points, expected.points)


@pytest.mark.parametrize("size", CONFIGS)
@pytest.mark.parametrize("name", ["safetensors", "opentad", "huggingface"])
def test_the_files_compute_what_the_detector_does(name: str, size: str, tmp_path: Path) -> None:
    """The detector with gaps, not the one that was written."""
    detector = detector_of(CONFIGS[size], KEPT[size])
    bundle = plain_bundle(detector)
    FORMATS[name].write(bundle, tmp_path)
    # Of the bundle nothing may come but what the format leaves out.
    stranger = replace(bundle, detector=Detector(bundle.config, len(CLASSES)).eval())
    if name == "huggingface":
        stranger.detector.head.load_state_dict(detector.head.state_dict())
    forward = FORMATS[name].read(tmp_path, stranger)
    frames, mask = windows(detector.config, 2)
    with torch.no_grad():
        close(forward(frames, mask), detector(frames, mask), 0.0)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Path]:
    """A detector and its ONNX export, which takes ten seconds to make."""
    detector, folder = detector_of(TINY, KEPT["tiny"]), tmp_path_factory.mktemp("onnx")
    FORMATS["onnx"].write(plain_bundle(detector), folder)
    return detector, folder


@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_for_any_batch_size(batch: int, graph: tuple[Detector, Path]) -> None:
    detector, folder = graph
    frames, mask = windows(detector.config, batch)
    with torch.no_grad():
        expected = detector(frames, mask)
    assert float(expected.logits.std()) > 1e-3
    close(FORMATS["onnx"].read(folder, plain_bundle(detector))(frames, mask), expected, 1e-5)


def test_an_onnx_file_that_is_none(graph: tuple[Detector, Path], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"model.onnx: onnxruntime cannot load it: ") as error:
        FORMATS["onnx"].read(tmp_path, plain_bundle(graph[0]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", CONFIGS)
def test_transformers_computes_the_tokens_of_the_backbone(size: str, tmp_path: Path) -> None:
    """On clips of the size that the position table is for: transformers does not interpolate it."""
    from transformers import VideoMAEModel

    detector = detector_of(CONFIGS[size], KEPT[size])
    FORMATS["huggingface"].write(plain_bundle(detector), tmp_path)
    model: Any = VideoMAEModel.from_pretrained(tmp_path).eval()
    backbone, pixels = detector.backbone, detector.config.backbone.position_table_pixels
    frames = torch.randint(0, 256, (1, 3, 16, pixels, pixels))
    with torch.no_grad():
        tokens = backbone.embed(frames)
        for index in backbone.kept_blocks:
            tokens = backbone.run_block(index, tokens)
        if detector.config.backbone.final_norm:
            tokens = backbone.norm(tokens)
        pixel_values = (frames - backbone.pixel_mean) / backbone.pixel_std
        found = model(pixel_values.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)


def opentad_names(model: dict[str, Any]) -> set[str]:
    """What OpenTAD's modules, built by this config, have in their state_dict; read off its source."""
    vit, projection, head = (model["backbone"]["backbone"], model["projection"], model["rpn_head"])
    both, weight = ("weight", "bias"), ("weight",)
    parts: list[tuple[str, tuple[str, ...]]] = [(f"{ROOT}patch_embed.projection", both)]
    parts.append((f"{ROOT}{'fc_norm' if vit['use_mean_pooling'] else 'norm'}", both))
    names = {f"{ROOT}pos_embed", "rpn_head.loss_normalizer"}
    for index in range(vit["depth"]):
        block = f"{ROOT}blocks.{index}."
        parts += [(f"{block}{part}", both) for part in ("norm1", "norm2", "attn.proj", "mlp.layers.0.0")]
        parts += [(f"{block}mlp.layers.1", both), (f"{block}attn.qkv", weight)]
        names |= {f"{block}attn.q_bias", f"{block}attn.v_bias"}
    embed, stem, branch = projection["arch"]
    convolutions = [f"projection.embed.{layer}" for layer in range(embed)]
    for tower in ("cls_convs", "reg_convs"):
        convolutions += [f"rpn_head.{tower}.{layer}" for layer in range(head["num_convs"])]
    for layer in convolutions:
        parts += [(f"{layer}.conv", weight), (f"{layer}.norm", both)]
    layers = [f"stem.{layer}" for layer in range(stem)] + [f"branch.{layer}" for layer in range(branch)]
    for layer in (f"projection.{name}" for name in layers):
        parts += [(f"{layer}.{part}", both) for part in ("ln1", "ln2", "mlp.0", "mlp.3", "attn.proj")]
        for part in ("query", "key", "value"):
            parts += [(f"{layer}.attn.{part}_conv.conv", weight), (f"{layer}.attn.{part}_norm", both)]
            parts.append((f"{layer}.attn.{part}", both))
        if projection["path_pdrop"] > 0:
            names |= {f"{layer}.drop_path_attn.scale", f"{layer}.drop_path_mlp.scale"}
    levels = len(head["prior_generator"]["strides"])
    assert levels == model["neck"]["num_levels"] == branch + 1
    parts += [(f"neck.fpn_norms.{level}", both) for level in range(levels)]
    parts += [("rpn_head.cls_head", both), ("rpn_head.reg_head", both)]
    names |= {f"rpn_head.scale.{level}.scale" for level in range(levels)}
    return names | {f"{part}.{end}" for part, ends in parts for end in ends}


@pytest.mark.parametrize("size", CONFIGS)
def test_opentad_gets_every_tensor_that_its_config_builds(size: str, tmp_path: Path) -> None:
    """`tools/test.py` loads strictly, into a DistributedDataParallel, and prefers the EMA weights."""
    detector = detector_of(CONFIGS[size], KEPT[size])
    FORMATS["opentad"].write(plain_bundle(detector), tmp_path)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    config = runpy.run_path(str(tmp_path / "config.py"))
    model = config["model"]
    assert set(checkpoint["state_dict"]) == {f"module.{name}" for name in opentad_names(model)}
    assert checkpoint["state_dict_ema"].keys() == checkpoint["state_dict"].keys() and "epoch" in checkpoint
    vit = model["backbone"]["backbone"]
    dim = detector.config.backbone.embed_dim
    assert (vit["depth"], vit["embed_dims"]) == (len(KEPT[size]), dim)
    state = checkpoint["state_dict"]
    assert state[f"module.{ROOT}pos_embed"].shape == (1, 8 * (vit["img_size"] // vit["patch_size"]) ** 2, dim)
    assert state["module.rpn_head.cls_head.weight"].shape[0] == model["rpn_head"]["num_classes"] == 3
    assert (tmp_path / "category_idx.txt").read_text("utf-8").splitlines() == list(CLASSES)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        pytest.param(
            {}, {"type": "ThumosSlidingDataset", "window_size": 768, "feature_stride": 4}, id="THUMOS14"
        ),
        pytest.param(
            {"feature_steps": 192},
            {"type": "ThumosSlidingDataset", "window_size": 192, "feature_stride": 16},
            id="four frames a step",
        ),
        pytest.param(
            {"kind": "resize", "feature_steps": 192},
            {"type": "AnetResizeDataset", "resize_length": 192},
            id="ActivityNet",
        ),
    ],
)
def test_opentad_reads_the_frames_that_we_read(
    grid: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    """The numbers of its own configs for these data sets (768x1 and 192x4)."""
    (tmp_path / "config.py").write_text(opentad_config(DetectorConfig(grid=GridConfig(**grid)), CLASSES, ""))
    config = runpy.run_path(str(tmp_path / "config.py"))
    dataset = config["dataset"]["test"]
    assert {key: dataset[key] for key in expected} == expected
    load = next(step for step in dataset["pipeline"] if step["type"] == "LoadFrames")
    steps = expected.get("window_size") or expected["resize_length"]
    assert load["scale_factor"] * steps == 768
    assert config["model"]["backbone"]["custom"]["pre_processing_pipeline"][0]["t1"] == 48
    assert dataset["class_map"] == "{{ fileDirname }}/category_idx.txt"  # mmengine puts its folder there


RELU = changed("backbone", activation="relu")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("opentad", RELU, "backbone.activation is relu"),
        ("huggingface", RELU, "backbone.activation is relu"),
        ("opentad", changed("grid", feature_steps=24), "grid.window_frames 32 is not a multiple"),
        ("opentad", changed("head", attention_window_steps=1), "head.attention_window_steps 1"),
        ("opentad", changed("head", attention_window_steps=12), "head.attention_window_steps 12"),
    ],
)
def test_what_a_format_cannot_hold(name: str, config: DetectorConfig, message: str, tmp_path: Path) -> None:
    bundle = plain_bundle(Detector(config, len(CLASSES), (0, 1)))
    with pytest.raises(UserError) as error:
        FORMATS[name].write(bundle, tmp_path)
    assert str(error.value).startswith(f"{name}: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_positions_that_transformers_does_not_compute(tmp_path: Path) -> None:
    detector = Detector(TINY, len(CLASSES))
    detector.backbone.position_table *= 0.3
    with pytest.raises(UserError, match=r"huggingface: backbone.position_table is up to 0.7 from"):
        FORMATS["huggingface"].write(plain_bundle(detector), tmp_path)


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_onnx_without_its_packages(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        FORMATS["onnx"].write(plain_bundle(Detector(TINY, len(CLASSES))), tmp_path)
    assert str(error.value) == f"onnx: {package} is not installed: pip install 'pbd_ray[export]'"
