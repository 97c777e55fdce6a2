"""Whole detectors of OpenTAD, AdaTAD and the paper's release: ActionFormer on VideoMAE, both ways."""

from __future__ import annotations

import re

from torch import Tensor

from pbd_ray.detector.detector import Detector
from pbd_ray.detector.pretrained import Import, ImportReport, PretrainedError, Source, read_weights

ROOT = "backbone.model.backbone."
"""What stands before the backbone's keys in an OpenTAD detector."""

_BLOCK = re.escape(ROOT) + r"blocks\.(?P<index>\d+)\."
_LORA = re.compile(_BLOCK + r"attn\.lora_(?P<layer>qkv|proj)\.(?P<factor>A|B)$")


def opentad_key(name: str) -> str:
    """The name in an OpenTAD detector of one of our state_dict keys."""
    for pattern, replacement in _TO_OPENTAD:
        translated, count = pattern.subn(replacement, name)
        if count:
            return translated
    raise AssertionError(f"no OpenTAD name for {name}")


_TO_OPENTAD = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^backbone\.position_table$", r"backbone.model.backbone.pos_embed"),
        (r"^backbone\.patch_embed\.", r"backbone.model.backbone.patch_embed.projection."),
        (r"^backbone\.blocks\.(\d+)\.mlp\.fc1\.", r"backbone.model.backbone.blocks.\1.mlp.layers.0.0."),
        (r"^backbone\.blocks\.(\d+)\.mlp\.fc2\.", r"backbone.model.backbone.blocks.\1.mlp.layers.1."),
        (r"^backbone\.", r"backbone.model.backbone."),
        (r"^head\.embedding\.", r"projection.embed."),
        (r"^head\.(stem|branch)\.(\d+)\.norm([12])\.", r"projection.\1.\2.ln\3."),
        (r"^head\.(stem|branch)\.(\d+)\.attention_scale\.", r"projection.\1.\2.drop_path_attn."),
        (r"^head\.(stem|branch)\.(\d+)\.mlp_scale\.", r"projection.\1.\2.drop_path_mlp."),
        (
            r"^head\.(stem|branch)\.(\d+)\.attention\.(query|key|value)_conv\.",
            r"projection.\1.\2.attn.\3_conv.conv.",
        ),
        (r"^head\.(stem|branch)\.(\d+)\.attention\.", r"projection.\1.\2.attn."),
        (r"^head\.(stem|branch)\.", r"projection.\1."),
        (r"^head\.level_norms\.", r"neck.fpn_norms."),
        (r"^head\.class_layers\.", r"rpn_head.cls_convs."),
        (r"^head\.boundary_layers\.", r"rpn_head.reg_convs."),
        (r"^head\.class_output\.", r"rpn_head.cls_head."),
        (r"^head\.boundary_output\.", r"rpn_head.reg_head."),
        (r"^head\.boundary_scales\.(\d+)$", r"rpn_head.scale.\1.scale"),
        (r"^head\.loss_normalizer$", r"rpn_head.loss_normalizer"),
    )
)


def load_opentad(
    detector: Detector, source: Source, *, merge_lora: bool = True, ema: bool = True
) -> ImportReport:
    """Load a detector of OpenTAD's or AdaTAD's ActionFormer with VideoMAE (the paper's release too).

    Blocks of the file that the detector has dropped are ignored; LoRA factors that are still apart
    are merged, W + (A B)^T. Labels keep the order of the file: that of OpenTAD's class map.

    Args:
        source: a .pth checkpoint, a .safetensors file, or what has been read already.
        merge_lora: False ignores LoRA factors.
        ema: take a checkpoint's EMA weights where it has them.

    Raises:
        PretrainedError: unreadable file, or a key that is missing, unknown or of another shape.
    """
    file = read_weights(source, ema=ema)
    work = Import(file.source, {_without_prefix(key): value for key, value in file.tensors.items()})
    if len(work.tensors) != len(file.tensors):
        raise PretrainedError(f"{work.source}: some tensors are there with and without 'module.'")
    kept = set(detector.kept_blocks)
    for key in work.tensors:
        block = re.match(_BLOCK, key)
        if block and int(block["index"]) not in kept:
            work.ignore(key, f"block {block['index']} is dropped")
        elif _LORA.match(key) and not merge_lora:
            work.ignore(key, "merge_lora is off")
        elif ".adapter." in key:
            raise PretrainedError(
                f"{work.source}: tensor '{key}' is of an AdaTAD adapter: a convolution over time, which "
                "the detector does not have and which cannot be merged into a block"
            )
    if not detector.config.backbone.unused_norm:
        for part in ("weight", "bias"):
            work.ignore(f"{ROOT}fc_norm.{part}", "fc_norm, which no forward uses")
    work.ignore("projection.pos_embed", "computed from its formula")
    for ours in detector.state_dict():
        work.values[ours] = work.take(opentad_key(ours))
    if merge_lora:
        _merge_lora(work)
    return work.write(detector)


def to_opentad(detector: Detector) -> dict[str, Tensor]:
    """The detector's tensors under OpenTAD's names: the inverse of `load_opentad`."""
    return {opentad_key(name): tensor.detach() for name, tensor in detector.state_dict().items()}


def _merge_lora(work: Import) -> None:
    pairs = {(m["index"], m["layer"]) for key in work.tensors if (m := _LORA.match(key))}
    for index, layer in sorted(pairs):
        target = f"backbone.blocks.{index}.attn.{layer}.weight"
        if target in work.values:
            prefix = f"{ROOT}blocks.{index}.attn.lora_{layer}."
            a, b, weight = work.take(f"{prefix}A"), work.take(f"{prefix}B"), work.values[target]
            fits = a.ndim == b.ndim == weight.ndim == 2 and a.shape[1] == b.shape[0]
            if not fits or (a.shape[0], b.shape[1]) != (weight.shape[1], weight.shape[0]):
                raise PretrainedError(
                    f"{work.source}: LoRA factors of '{target}' have shapes {list(a.shape)}, {list(b.shape)}"
                )
            work.values[target] = weight + (a @ b).T


def _without_prefix(key: str) -> str:
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key
