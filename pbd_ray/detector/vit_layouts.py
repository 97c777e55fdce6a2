"""How weight files name the parts of a vision transformer, and which parts ours does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NoReturn

from torch import Tensor

from pbd_ray.detector.opentad import ROOT
from pbd_ray.detector.pretrained import PretrainedError, WeightFile

_DECODER = "part of masked pretraining only"
_CLASSIFIER = "the classifier of the pretraining data set"


@dataclass(frozen=True)
class Layout:
    """One family's names. A part's parameters are its name and `.weight` or `.bias`."""

    name: str
    patches: str
    """The patch embedding, a convolution."""
    positions: str | None
    """The position table; None: its formula is all there is."""
    blocks: str
    """What a block's index follows."""
    prefix: str = ""
    """Before all names of the backbone in this file."""
    norms: tuple[str, str] = ("norm1", "norm2")
    attention: tuple[str, ...] = ("attn.qkv",)
    """One projection, or those of query, key and value."""
    attention_biases: tuple[str, ...] = ("attn.qkv.bias",)
    """All in one; or query and value; or query, key and value. A file may have none of them."""
    outputs: tuple[str, str] = ("attn.proj", "mlp.fc2")
    """The last linear maps of attention and MLP."""
    hidden: str = "mlp.fc1"
    scales: tuple[str, str] | None = ("ls1.gamma", "ls2.gamma")
    """Layer scale of attention and MLP. A file may have neither."""
    final_norm: str = "norm"
    """After the last block, on every token."""
    pooled_norm: str = "fc_norm"
    """After the mean over tokens."""
    prefix_tokens: tuple[str, ...] = ()
    """Tokens before the patches, in the order of their rows in the position table."""
    others: tuple[tuple[str, str], ...] = ()
    """Start of a name, with or without the prefix -> why its tensors are not needed."""

    def block(self, index: int) -> str:
        """What stands before the names of a block's parts."""
        return f"{self.prefix}{self.blocks}.{index}."


TIMM = Layout(
    name="timm image ViT",
    patches="patch_embed.proj",
    positions="pos_embed",
    blocks="blocks",
    prefix_tokens=("cls_token", "dist_token", "reg_token"),
    others=(
        ("head.", _CLASSIFIER),
        ("head_dist.", _CLASSIFIER),
        ("pre_logits.", _CLASSIFIER),
        ("attn_pool.", _CLASSIFIER),
    ),
)

VIDEOMAE_RELEASE = replace(
    TIMM,
    name="VideoMAE release",
    attention_biases=("attn.q_bias", "attn.v_bias"),
    scales=("gamma_1", "gamma_2"),
    prefix_tokens=(),
    others=(
        ("head.", _CLASSIFIER),
        ("decoder.", _DECODER),
        ("encoder_to_decoder.", _DECODER),
        ("mask_token", _DECODER),
    ),
)
"""MCG-NJU/VideoMAE `modeling_finetune.py`; `modeling_pretrain.py` puts `encoder.` before it."""

MMACTION = replace(
    VIDEOMAE_RELEASE,
    name="mmaction2 VideoMAE",
    patches="patch_embed.projection",
    outputs=("attn.proj", "mlp.layers.1"),
    hidden="mlp.layers.0.0",
    others=(("cls_head.", _CLASSIFIER),),
)
"""mmaction2 `backbones/vit_mae.py`, whose names OpenTAD uses too; `backbone.` before it in recognizers."""

HUGGING_FACE_VIDEOMAE = Layout(
    name="transformers VideoMAE",
    patches="embeddings.patch_embeddings.projection",
    positions=None,
    blocks="encoder.layer",
    norms=("layernorm_before", "layernorm_after"),
    attention=tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    attention_biases=("attention.attention.query.bias", "attention.attention.value.bias"),
    outputs=("attention.output.dense", "output.dense"),
    hidden="intermediate.dense",
    scales=None,
    final_norm="layernorm",
    others=(
        ("classifier.", _CLASSIFIER),
        ("decoder.", _DECODER),
        ("encoder_to_decoder.", _DECODER),
        ("mask_token", _DECODER),
    ),
)
"""transformers `VideoMAEModel`, release 5."""

OLDER_HUGGING_FACE_VIDEOMAE = replace(
    HUGGING_FACE_VIDEOMAE, attention_biases=("attention.attention.q_bias", "attention.attention.v_bias")
)
"""The same in release 4, as the hub's files are; release 5 reads both."""

DINOV2 = Layout(
    name="transformers DINOv2",
    patches="embeddings.patch_embeddings.projection",
    positions="embeddings.position_embeddings",
    blocks="encoder.layer",
    attention=tuple(f"attention.{part}_proj" for part in "qkv"),
    attention_biases=tuple(f"attention.{part}_proj.bias" for part in "qkv"),
    outputs=("attention.o_proj", "mlp.fc2"),
    hidden="mlp.fc1",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    final_norm="layernorm",
    prefix_tokens=("embeddings.cls_token", "embeddings.register_tokens"),
    others=(("embeddings.mask_token", _DECODER), ("classifier.", _CLASSIFIER)),
)
"""transformers `Dinov2Model` and `Dinov2WithRegistersModel`; the hub's files use older names."""

_OLD_DINOV2 = replace(
    DINOV2,
    attention=HUGGING_FACE_VIDEOMAE.attention,
    attention_biases=tuple(f"{part}.bias" for part in HUGGING_FACE_VIDEOMAE.attention),
    outputs=("attention.output.dense", "mlp.fc2"),
)
_PATCHES = ("patch_embed.proj", "patch_embed.projection", "embeddings.patch_embeddings.projection")

_FOREIGN = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (r"(^|\.)norm_pre\.", "a norm before the blocks"),
        (r"\.(q|k)_norm\.", "norms of query and key"),
        (r"\.(attn|mlp)\.norm\.", "a norm inside attention or MLP"),
        (r"(^|\.)(rope|freqs)\b", "rotary positions"),
        (r"\brel(ative)?_pos", "relative positions"),
        (r"\.mlp\.(fc1_g|fc1_x|w12|w1|w2|w3|weights_in|gate_proj|up_proj)\.", "a gated MLP (SwiGLU)"),
        (r"\.(attns|ffns|in_norm|in_proj|in_split)\b", "parallel blocks"),
        (r"\badapter\b", "adapters"),
    )
)


def recognise(file: WeightFile) -> Layout:
    """The layout of a file by the names of its tensors, with the file's prefix in it.

    Raises:
        PretrainedError: no patch embedding that one of the layouts has, or a whole detector.
    """
    found = [(key, name) for key in sorted(file.tensors) for name in _PATCHES if _is(key, f"{name}.weight")]
    if len(found) != 1:
        raise PretrainedError(
            f"{file.source}: has {len(found)} patch embeddings ({', '.join(_PATCHES)}), expected 1"
        )
    ((key, name),) = found
    prefix = key.removesuffix(f"{name}.weight")
    if prefix.endswith(ROOT):
        raise PretrainedError(f"{file.source}: is a whole detector: name it as experiment.teacher.source")
    layout = _named(name, file.tensors[key], [k.removeprefix(prefix) for k in file.tensors])
    return replace(layout, prefix=prefix)


def _named(patches: str, kernel: Tensor, names: list[str]) -> Layout:
    """Layouts share the patch embedding's name: what else tells them apart."""
    if patches == MMACTION.patches:
        return MMACTION
    if patches == TIMM.patches:
        # timm's image ViTs with `q_bias` are Eva and BEiT, whose norms or positions may be elsewhere
        # without a tensor that shows it: their keys stay unknown.
        return VIDEOMAE_RELEASE if kernel.ndim == 5 else TIMM
    if _any_ends(names, (".layernorm_before.weight",)):
        older = OLDER_HUGGING_FACE_VIDEOMAE
        return older if _any_ends(names, older.attention_biases) else HUGGING_FACE_VIDEOMAE
    return _OLD_DINOV2 if _any_ends(names, (f"{_OLD_DINOV2.attention[0]}.weight",)) else DINOV2


def refuse_foreign_parts(source: str, keys: Iterable[str]) -> None:
    """Refuse what the backbone's blocks do not have, by its name.

    Raises:
        PretrainedError: naming the first such key.
    """
    for key in keys:
        for pattern, part in _FOREIGN:
            if pattern.search(key):
                refuse_part(source, key, part)


def refuse_part(source: str, key: str, part: str) -> NoReturn:
    """Say that the backbone does not have what this tensor belongs to."""
    raise PretrainedError(f"{source}: tensor '{key}' is of {part}: the backbone has none")


def _is(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _any_ends(names: Iterable[str], ends: tuple[str, ...]) -> bool:
    return any(name.endswith(ends) for name in names)
