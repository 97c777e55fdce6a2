"""What a config says about a model, and which of it the backbone can follow."""

from __future__ import annotations

from typing import Any

import pytest

from pbd_ray.config import BackboneConfig
from pbd_ray.detector.pretrained import PretrainedError, WeightFile
from pbd_ray.detector.vit_facts import Facts, check_facts, read_facts

SMALL = BackboneConfig(embed_dim=24, depth=3, num_heads=2)


def facts_of(config: dict[str, Any]) -> Facts:
    return read_facts(WeightFile("w", {}, config))


def test_nothing_said() -> None:
    assert facts_of({}) == Facts()
    check_facts("w", Facts(), SMALL)


def test_transformers() -> None:
    said = {"num_attention_heads": 6, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_frames": 16}
    facts = facts_of(said | {"image_size": [224, 224], "model_type": "videomae"})
    assert facts == Facts(6, "gelu", 1e-12, 224, 16)
    assert facts_of({"num_attention_heads": "six", "image_size": [224, 160]}) == Facts()


def test_timm() -> None:
    """The named architecture is built without weights and looked at."""
    cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    facts = facts_of({"architecture": "vit_small_patch16_224", "pretrained_cfg": cfg})
    assert (facts.num_heads, facts.activation, facts.norm_eps) == (6, "gelu", 1e-6)
    assert (facts.pixel_mean, facts.pixel_std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert facts_of({"architecture": "vit_small_patch16_224", "mean": [0.1, 0.2, 0.3]}).pixel_mean[2] == 0.3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "vit_nosuch"}, "timm has no architecture 'vit_nosuch'"),
        ({"architecture": "hf-hub:somebody/vit"}, "timm has no architecture 'hf-hub:somebody/vit'"),
        (
            {"architecture": "vit_small_patch16_224", "model_args": {"nosuch": 1}},
            "timm cannot build its architecture 'vit_small_patch16_224'",
        ),
        ({"architecture": "eva02_tiny_patch14_224"}, "is timm's Eva, not a plain VisionTransformer"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "has timm's ResPostBlocks, not its plain blocks"),
        ({"architecture": "vit_small_patch16_224", "mean": [0.5]}, "mean [0.5] of its config is not three"),
        (
            {"architecture": "vit_small_patch16_224", "pretrained_cfg": {"std": [0, 1, 1]}},
            "std [0, 1, 1] of its config is not three numbers",
        ),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PretrainedError) as error:
        facts_of(config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 3}, "has 3 heads, backbone.num_heads is 2"),
        ({"hidden_act": "quick_gelu"}, "its activation is quick_gelu, the backbone's is gelu"),
        ({"layer_norm_eps": 1e-5}, "its norms have epsilon 1e-05, the backbone's 1e-06"),
        (
            {"architecture": "vit_base_patch32_siglip_256", "model_args": {"num_heads": 2, "embed_dim": 24}},
            "its activation is GELUTanh(), the backbone's is gelu",
        ),
    ],
)
def test_what_the_backbone_cannot_follow(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PretrainedError) as error:
        check_facts("w", facts_of(config), SMALL)
    assert message in str(error.value)


def test_a_config_cannot_make_timm_fetch_or_open_weights() -> None:
    arguments = {"pretrained": True, "checkpoint_path": "/nowhere.pth", "num_heads": 3}
    assert facts_of({"architecture": "vit_small_patch16_224", "model_args": arguments}).num_heads == 3
