"""What the config beside a weight file says about its model that the tensors do not show.

Number of heads, activation, norm epsilon, order of the norms: two models that differ in these have
tensors of the same names and shapes. Where a file has no config, they are taken to be the backbone's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from pbd_ray.config import BackboneConfig, one_line
from pbd_ray.detector.pretrained import PretrainedError, WeightFile
from pbd_ray.detector.videomae import NORM_EPS, PIXEL_MEAN, PIXEL_STD

IMAGENET_MEAN = tuple(value / 255 for value in PIXEL_MEAN)
IMAGENET_STD = tuple(value / 255 for value in PIXEL_STD)


@dataclass(frozen=True)
class Facts:
    """What a config says; None where it says nothing."""

    num_heads: int | None = None
    activation: str | None = None
    norm_eps: float | None = None
    image_pixels: int | None = None
    """Side of the images the model was trained on."""
    frames: int | None = None
    """Length of the clips it was trained on."""
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    """Of pixels between 0 and 1, as the model wants them normalised."""
    pixel_std: tuple[float, ...] = IMAGENET_STD
    architecture: str | None = None
    """Name of a timm model that was found to have blocks like ours."""


def read_facts(file: WeightFile) -> Facts:
    """The facts of a transformers config or of timm's, whose named architecture is built (without
    weights) and looked at.

    Raises:
        PretrainedError: a timm architecture that is unknown or has other blocks than ours.
    """
    facts = file.facts
    if "architecture" in facts:
        return _timm_facts(file.source, facts)
    return Facts(
        num_heads=_integer(facts.get("num_attention_heads")),
        activation=_text(facts.get("hidden_act")),
        norm_eps=_number(facts.get("layer_norm_eps")),
        image_pixels=_integer(facts.get("image_size")),
        frames=_integer(facts.get("num_frames")),
    )


def check_facts(source: str, facts: Facts, config: BackboneConfig) -> None:
    """Refuse weights whose config says that the backbone would compute something else.

    Raises:
        PretrainedError: naming the value and the backbone's.
    """
    if config.activation != "gelu":
        raise PretrainedError(f"{source}: weights need backbone.activation gelu, got {config.activation}")
    if facts.activation not in (None, "gelu"):
        raise PretrainedError(f"{source}: its activation is {facts.activation}, the backbone's is gelu")
    if facts.num_heads not in (None, config.num_heads):
        raise PretrainedError(
            f"{source}: has {facts.num_heads} heads, backbone.num_heads is {config.num_heads}"
        )
    # transformers' VideoMAE says 1e-12 for weights that were trained with 1e-6; it makes no difference.
    if facts.norm_eps is not None and facts.norm_eps > NORM_EPS:
        raise PretrainedError(
            f"{source}: its norms have epsilon {facts.norm_eps:g}, the backbone's {NORM_EPS:g}"
        )


def _timm_facts(source: str, facts: Mapping[str, Any]) -> Facts:
    name = str(facts["architecture"])
    if not name.isprintable() or ":" in name or not timm.is_model(name):  # timm would fetch `hf-hub:...`
        raise PretrainedError(f"{source}: timm has no architecture {name[:100]!r}")
    given = facts.get("model_args")
    arguments = dict(given) if isinstance(given, dict) else {}
    arguments.update(pretrained=False, checkpoint_path="")  # sizes are asked for, never weights
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **arguments)
    except Exception as error:  # a config from anywhere may ask timm for anything
        reason = one_line(error)[:200]
        raise PretrainedError(f"{source}: timm cannot build its architecture {name!r}: {reason}") from None
    if not isinstance(model, VisionTransformer):
        raise PretrainedError(
            f"{source}: architecture {name!r} is timm's {type(model).__name__}, not a plain VisionTransformer"
        )
    block = model.blocks[0]
    if type(block) is not Block:
        raise PretrainedError(
            f"{source}: architecture {name!r} has timm's {type(block).__name__}s, not its plain blocks"
        )
    gelu = isinstance(block.mlp.act, nn.GELU) and block.mlp.act.approximate == "none"
    trained = facts.get("pretrained_cfg")
    trained = trained if isinstance(trained, dict) else facts
    return Facts(
        num_heads=_integer(block.attn.num_heads),
        activation="gelu" if gelu else repr(block.mlp.act),
        norm_eps=_number(getattr(block.norm1, "eps", None)),
        pixel_mean=_three(source, trained, "mean", IMAGENET_MEAN),
        pixel_std=_three(source, trained, "std", IMAGENET_STD),
        architecture=name,
    )


def _three(
    source: str, facts: Mapping[str, Any], key: str, otherwise: tuple[float, ...]
) -> tuple[float, ...]:
    value = facts.get(key)
    if value is None:
        return otherwise
    numbers = [_number(v) for v in value] if isinstance(value, list) else []
    if len(numbers) != 3 or not all(n is not None and (key == "mean" or n > 0) for n in numbers):
        raise PretrainedError(f"{source}: {key} {value!r} of its config is not three numbers")
    return tuple(n for n in numbers if n is not None)


def _integer(value: Any) -> int | None:
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]  # transformers lets a size be [height, width]
    return value if type(value) is int else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
