"""VideoMAE weights as the start of a backbone: transformers' numbers, whatever the names of the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)

from pbd_ray.config import BackboneConfig, GridConfig
from pbd_ray.detector.pretrained import PretrainedError, WeightFile
from pbd_ray.detector.videomae import PIXEL_MEAN, PIXEL_STD, VideoMAE
from pbd_ray.detector.vit_weights import load_backbone

PIXELS = 32
GRID = GridConfig(window_frames=16, feature_steps=16, crop_pixels=PIXELS)
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
SMALL |= {"patch_size": 8, "image_size": PIXELS}
DECODER = {
    "decoder_hidden_size": 12,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}


def backbone_like(config: VideoMAEConfig, **changes: object) -> VideoMAE:
    ours = BackboneConfig(
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        patch_pixels=config.patch_size,
        position_table_pixels=config.image_size,
    ).model_copy(update=changes)
    return VideoMAE(ours, GRID).eval()


def randomize(module: nn.Module) -> None:
    """Every parameter away from its start, so that none can be forgotten; activations stay small."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.02)


def small(kind: type[Any] = VideoMAEModel, **changes: object) -> Any:
    torch.manual_seed(0)
    model = kind(VideoMAEConfig(**{**SMALL, **DECODER, **changes})).eval()
    randomize(model)
    return model


def tokens_after_blocks(backbone: VideoMAE, frames: Tensor) -> Tensor:
    with torch.no_grad():
        tokens = backbone.embed(frames)
        for index in backbone.kept_blocks:
            tokens = backbone.run_block(index, tokens)
        return backbone.norm(tokens) if backbone.config.final_norm else tokens


def sequence_output(model: Any, frames: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    with torch.no_grad():
        output: Tensor = model(((frames - mean) / std).transpose(1, 2)).last_hidden_state
    return output


def clip() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (1, 3, 16, PIXELS, PIXELS)).float()


def same(a: VideoMAE, b: VideoMAE) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "mean_pooling"),
    [
        pytest.param(384, 12, 6, True, id="S"),
        pytest.param(384, 12, 6, False, id="S with the norm of pretraining"),
        pytest.param(768, 12, 12, True, id="B"),
    ],
)
def test_sequence_output_of_transformers(dim: int, depth: int, heads: int, mean_pooling: bool) -> None:
    torch.manual_seed(0)
    config = VideoMAEConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        image_size=PIXELS,
        use_mean_pooling=mean_pooling,
    )
    model = VideoMAEModel(config).eval()
    randomize(model)
    backbone = backbone_like(config, final_norm=not mean_pooling)
    report = load_backbone(backbone, WeightFile("videomae", model.state_dict(), config.to_dict()))
    assert set(report.loaded) == set(model.state_dict()) and report.ignored == {}
    frames = clip()
    torch.testing.assert_close(
        tokens_after_blocks(backbone, frames), sequence_output(model, frames), rtol=1e-4, atol=1e-5
    )


def test_saved_by_transformers(tmp_path: Path) -> None:
    """The real files: `save_pretrained` writes the config beside the tensors."""
    model = small()
    model.save_pretrained(tmp_path)
    backbone = backbone_like(model.config)
    load_backbone(backbone, tmp_path / "model.safetensors")
    torch.testing.assert_close(
        tokens_after_blocks(backbone, clip()), sequence_output(model, clip()), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(PretrainedError, match=r"has 2 heads, backbone\.num_heads is 3"):
        load_backbone(backbone_like(model.config, num_heads=3), tmp_path / "model.safetensors")
    model.config.hidden_act = "relu"
    model.config.save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match="its activation is relu, the backbone's is gelu"):
        load_backbone(backbone_like(model.config), tmp_path / "model.safetensors")
    model.config.hidden_act, model.config.layer_norm_eps = "gelu", 1e-5
    model.config.save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match="its norms have epsilon 1e-05, the backbone's 1e-06"):
        load_backbone(backbone_like(model.config), tmp_path / "model.safetensors")


def test_heads_of_pretraining_and_classification_are_ignored() -> None:
    pretraining = small(VideoMAEForPreTraining, use_mean_pooling=False)
    state = pretraining.state_dict()
    backbone = backbone_like(pretraining.config)
    report = load_backbone(backbone, WeightFile("videomae", state, pretraining.config.to_dict()))
    assert set(report.loaded) | set(report.ignored) == set(state)
    assert {key for key in report.ignored if key.startswith("videomae.")} == {
        "videomae.layernorm.weight",
        "videomae.layernorm.bias",
    }
    assert report.ignored["videomae.layernorm.bias"] == "backbone.final_norm is off"
    assert report.ignored["decoder.norm.bias"] == "part of masked pretraining only"
    classifier = small(VideoMAEForVideoClassification)
    classifier.videomae.load_state_dict(
        {k: v for k, v in pretraining.videomae.state_dict().items() if not k.startswith("layernorm")}
    )
    other = backbone_like(classifier.config)
    facts = classifier.config.to_dict()
    report = load_backbone(other, WeightFile("videomae", classifier.state_dict(), facts))
    assert set(report.ignored) == {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
    assert same(other, backbone)
    carried = backbone_like(classifier.config, unused_norm=True)
    load_backbone(carried, WeightFile("videomae", classifier.state_dict(), facts))
    assert torch.equal(carried.fc_norm.weight, classifier.fc_norm.weight)


def test_the_hubs_older_biases() -> None:
    model = small()
    older = {
        key.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): value
        for key, value in model.state_dict().items()
    }
    backbones = [backbone_like(model.config) for _ in range(2)]
    for backbone, state in zip(backbones, (model.state_dict(), older), strict=True):
        load_backbone(backbone, WeightFile("videomae", state, model.config.to_dict()))
    assert same(*backbones)


def test_weights_without_biases_of_query_and_value() -> None:
    model = small(qv_bias=False)
    backbone = backbone_like(model.config)
    load_backbone(backbone, WeightFile("videomae", model.state_dict(), model.config.to_dict()))
    torch.testing.assert_close(
        tokens_after_blocks(backbone, clip()), sequence_output(model, clip()), rtol=1e-4, atol=1e-5
    )


def released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names as those of VideoMAE's own code (its conversion script, backwards)."""
    names = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer": "blocks",
        "attention.attention.query.bias": "attn.q_bias",
        "attention.attention.value.bias": "attn.v_bias",
        "attention.output.dense": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm.": "norm.",
    }
    renamed = with_names(names, state)
    parts = [renamed.pop(k) for k in list(renamed) if re.search(r"attention\.(query|key|value)\.weight$", k)]
    for index in range(len(parts) // 3):
        renamed[f"blocks.{index}.attn.qkv.weight"] = torch.cat(parts[3 * index : 3 * index + 3])
    return renamed


def mmaction(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VideoMAE's names as those of mmaction2 and OpenTAD, whose position table is in the file."""
    names = {
        "patch_embed.proj": "patch_embed.projection",
        "mlp.fc1": "mlp.layers.0.0",
        "mlp.fc2": "mlp.layers.1",
    }
    return with_names(names, state)


def with_names(names: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every key with each part of `names` replaced, in their order."""
    renamed = {}
    for key, value in state.items():
        for theirs, name in names.items():
            key = key.replace(theirs, name)
        renamed[key] = value
    return renamed


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def test_names_of_the_release_and_of_mmaction() -> None:
    """The same weights under every name give the same backbone; the rest of such files is ignored."""
    model = small(use_mean_pooling=False)
    plain, facts = model.state_dict(), model.config.to_dict()
    wanted = backbone_like(model.config, final_norm=True)
    load_backbone(wanted, WeightFile("videomae", plain, facts))
    release = released(plain)
    decoder = {"decoder.blocks.0.attn.q_bias": torch.zeros(12), "mask_token": torch.zeros(1, 1, 12)}
    decoder["encoder_to_decoder.weight"] = torch.zeros(12, 24)
    table = {"pos_embed": wanted.position_table}
    heads = {"head.weight": torch.zeros(400, 24), "head.bias": torch.zeros(400)}
    files = {
        "finetuned": release | heads,
        "finetuned, on the hub": with_prefix("model.", release | heads),
        "pretrained": with_prefix("encoder.", release) | decoder,
        "a learned table": release | table,
        "mmaction2": with_prefix("backbone.", mmaction(release) | table)
        | {"cls_head.fc_cls.weight": torch.zeros(400, 24)},
    }
    for name, tensors in files.items():
        backbone = backbone_like(model.config, final_norm=True)
        report = load_backbone(backbone, WeightFile(name, tensors, {"image_size": PIXELS}))
        assert set(report.loaded) | set(report.ignored) == set(tensors), name
        assert same(backbone, wanted), name


def test_layer_scale_of_the_release_is_folded() -> None:
    model = small()
    state = released(model.state_dict())
    plain, scaled = backbone_like(model.config), backbone_like(model.config)
    load_backbone(plain, WeightFile("release", state))
    gammas = {f"blocks.{i}.gamma_{branch}": torch.full((24,), 0.5) for i in range(3) for branch in (1, 2)}
    load_backbone(scaled, WeightFile("release", state | gammas))
    for name in ("attn.proj.weight", "mlp.fc2.bias"):
        ours, theirs = (b.state_dict()[f"blocks.1.{name}"] for b in (scaled, plain))
        torch.testing.assert_close(ours, theirs / 2)
    with pytest.raises(PretrainedError, match=r"tensor 'blocks\.2\.gamma_2' is missing"):
        load_backbone(scaled, WeightFile("release", state | {k: gammas[k] for k in list(gammas)[:-1]}))


def test_positions_without_a_table_are_those_of_training(tmp_path: Path) -> None:
    """The formula numbers all tokens of a clip, so it must be asked for the size of training: 224."""
    model = small(image_size=224)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    wide, narrow = backbone_like(model.config), backbone_like(model.config, position_table_pixels=PIXELS)
    for backbone in (wide, narrow):
        load_backbone(backbone, tmp_path / "bare.safetensors")
    torch.testing.assert_close(wide.position_table, model.embeddings.position_embeddings)
    torch.testing.assert_close(narrow.position_table, wide.positions(4, 4))


@pytest.mark.parametrize(
    ("changes", "facts", "message"),
    [
        ({"chunk_frames": 8}, {}, "was trained on clips of 16 frames, backbone.chunk_frames is 8"),
        ({}, {"num_frames": 32}, "was trained on clips of 32 frames, backbone.chunk_frames is 16"),
        ({"tubelet_frames": 4}, {}, "has shape [24, 3, 2, 8, 8], the detector needs [24, 3, 4, 8, 8]"),
        ({"depth": 4}, {}, "has 3 blocks, backbone.depth is 4"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, object], facts: dict[str, int], message: str) -> None:
    model = small()
    with pytest.raises(PretrainedError) as error:
        load_backbone(
            backbone_like(model.config, **changes), WeightFile("videomae", model.state_dict(), facts)
        )
    assert message in str(error.value) and "\n" not in str(error.value)
