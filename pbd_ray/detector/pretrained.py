"""Weights from elsewhere: an image ViT to start a teacher from, and whole OpenTAD detectors.

Every key of a file is accounted for: loaded, or ignored with a reason, or an error. Nothing is
half-loaded: all is checked before the first tensor is written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pbd_ray.config import UserError
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.videomae import VideoMAE

Tensors = Mapping[str, Tensor]


class PretrainedError(UserError):
    """A weight file does not fit the detector. The message is one line for the user."""


@dataclass(frozen=True)
class ImportReport:
    """What became of every key of a weight file."""

    loaded: tuple[str, ...]
    """Keys of the file, sorted."""
    ignored: dict[str, str]
    """Key of the file -> why it is not needed."""


@dataclass
class _Import:
    """The keys of a file on their way into a model: collect first, then check, then write."""

    source: str
    tensors: Tensors
    values: dict[str, Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    ignored: dict[str, str] = field(default_factory=dict)

    def take(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise PretrainedError(f"{self.source}: tensor '{key}' is missing")
        self.used.add(key)
        return self.tensors[key].float()

    def ignore(self, key: str, reason: str) -> None:
        if key in self.tensors:
            self.ignored[key] = reason

    def write(self, model: nn.Module) -> ImportReport:
        """Check that file and model are covered, shape for shape, then copy."""
        unknown = sorted(set(self.tensors) - self.used - set(self.ignored))
        if unknown:
            raise PretrainedError(f"{self.source}: unknown tensor '{unknown[0]}' ({len(unknown)} in all)")
        state = model.state_dict()
        assert set(self.values) <= set(state), sorted(set(self.values) - set(state))
        for name, value in self.values.items():
            if value.shape != state[name].shape:
                raise PretrainedError(
                    f"{self.source}: tensor for '{name}' has shape {list(value.shape)}, "
                    f"the detector needs {list(state[name].shape)}"
                )
            if not torch.isfinite(value).all():
                raise PretrainedError(f"{self.source}: tensor for '{name}' has values that are not finite")
        with torch.no_grad():
            for name, value in self.values.items():
                state[name].copy_(value)
        return ImportReport(tuple(sorted(self.used)), dict(sorted(self.ignored.items())))


def load_dinov2_layout(backbone: VideoMAE, path: str | Path) -> ImportReport:
    """Start the backbone from an image ViT in the layout of `transformers.Dinov2Model`.

    Layer scale is folded into the output projections and the key bias left out: neither changes a
    block's output. Patch kernels are resized and spread over the tubelet, positions interpolated and
    repeated over time, the class token dropped; the final norm is kept where the backbone has
    `final_norm`. Blocks the backbone has dropped are ignored.

    Raises:
        PretrainedError: unreadable file, sizes that do not fit, a missing or an unknown key.
    """
    tensors, metadata = _read(path)
    source = str(path)
    config = backbone.config
    if config.activation != "gelu":
        raise PretrainedError(f"{source}: weights need backbone.activation gelu, got {config.activation}")
    heads = _metadata_heads(metadata)
    if heads is not None and heads != config.num_heads:
        raise PretrainedError(f"{source}: has {heads} heads, backbone.num_heads is {config.num_heads}")
    indices = {int(m[1]) for key in tensors if (m := re.match(r"encoder\.layer\.(\d+)\.", key))}
    if indices != set(range(config.depth)):
        raise PretrainedError(f"{source}: has {len(indices)} blocks, backbone.depth is {config.depth}")
    work = _Import(source, tensors)
    kernel = work.take("embeddings.patch_embeddings.projection.weight")
    if kernel.shape[0] != config.embed_dim:
        width = kernel.shape[0]
        raise PretrainedError(f"{source}: has width {width}, backbone.embed_dim is {config.embed_dim}")
    kernel = resize_patch_kernel(kernel, config.patch_pixels) / config.tubelet_frames
    work.values["patch_embed.weight"] = kernel.unsqueeze(2).repeat(1, 1, config.tubelet_frames, 1, 1)
    work.values["patch_embed.bias"] = work.take("embeddings.patch_embeddings.projection.bias")
    positions = work.take("embeddings.position_embeddings")[:, 1:]
    if math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        raise PretrainedError(f"{source}: {positions.shape[1]} positions are not a square image")
    side = config.position_table_pixels // config.patch_pixels
    work.values["position_table"] = _resize_positions(positions, side).repeat(1, backbone.chunk_steps, 1)
    for index in sorted(indices):
        _take_dinov2_block(work, index, kept=index in backbone.kept_blocks)
    work.ignore("embeddings.cls_token", "the video backbone has no class token")
    work.ignore("embeddings.mask_token", "used only by masked pretraining")
    for part in ("weight", "bias"):
        if config.final_norm:
            work.values[f"norm.{part}"] = work.take(f"layernorm.{part}")
        else:
            work.ignore(f"layernorm.{part}", "backbone.final_norm is off")
    return work.write(backbone)


def _take_dinov2_block(work: _Import, index: int, kept: bool) -> None:
    theirs, ours = f"encoder.layer.{index}.", f"blocks.{index}."
    if not kept:
        for key in work.tensors:
            if key.startswith(theirs):
                work.ignore(key, f"block {index} is dropped")
        return
    values = work.values

    def take(name: str) -> Tensor:
        return work.take(theirs + name)

    for norm in ("norm1", "norm2"):
        values[f"{ours}{norm}.weight"] = take(f"{norm}.weight")
        values[f"{ours}{norm}.bias"] = take(f"{norm}.bias")
    values[f"{ours}attn.qkv.weight"] = torch.cat([take(f"attention.{n}_proj.weight") for n in "qkv"])
    values[f"{ours}attn.q_bias"] = take("attention.q_proj.bias")
    values[f"{ours}attn.v_bias"] = take("attention.v_proj.bias")
    work.ignore(f"{theirs}attention.k_proj.bias", "softmax does not see a constant added to all keys")
    values[f"{ours}mlp.fc1.weight"] = take("mlp.fc1.weight")
    values[f"{ours}mlp.fc1.bias"] = take("mlp.fc1.bias")
    folded = (("attn.proj", "attention.o_proj", "layer_scale1"), ("mlp.fc2", "mlp.fc2", "layer_scale2"))
    for name, their_name, scale_name in folded:
        scale = take(f"{scale_name}.lambda1")
        values[f"{ours}{name}.weight"] = take(f"{their_name}.weight") * scale[:, None]
        values[f"{ours}{name}.bias"] = take(f"{their_name}.bias") * scale


def resize_patch_kernel(kernel: Tensor, size: int) -> Tensor:
    """Patch kernels for another patch size with the same response (FlexiViT, arXiv 2212.08013, 3.4).

    If B resizes a patch bicubically, the new kernel is pinv(B) w: the inner product with a resized
    patch is that of w with the patch before, exactly when patches grow, in the mean when they shrink.

    Args:
        kernel: (d, channels, old, old).

    Returns:
        (d, channels, size, size).
    """
    old = kernel.shape[-1]
    if old == size:
        return kernel
    basis = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    resize = F.interpolate(
        basis, size=(size, size), mode="bicubic", align_corners=False, antialias=size < old
    ).flatten(1)
    resized: Tensor = kernel.double().flatten(2) @ torch.linalg.pinv(resize).T
    return resized.to(kernel.dtype).reshape(*kernel.shape[:2], size, size)


def _resize_positions(positions: Tensor, side: int) -> Tensor:
    """(1, old * old, d) -> (1, side * side, d)."""
    old = math.isqrt(positions.shape[1])
    image = positions.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2)


def _metadata_heads(metadata: Mapping[str, str]) -> int | None:
    try:
        heads = json.loads(metadata["config"])["num_attention_heads"]
    except (KeyError, TypeError, ValueError):
        return None
    return heads if isinstance(heads, int) else None


_BLOCK = r"backbone\.model\.backbone\.blocks\.(?P<index>\d+)\."
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
    detector: Detector, source: str | Path | Tensors, *, merge_lora: bool = True, ema: bool = True
) -> ImportReport:
    """Load a detector of OpenTAD's or AdaTAD's ActionFormer with VideoMAE (the paper's release too).

    Blocks of the file that the detector has dropped are ignored; LoRA factors that are still apart
    are merged, W + (A B)^T.

    Args:
        source: a .pth checkpoint, a .safetensors file, or the tensors themselves.
        merge_lora: False ignores LoRA factors.
        ema: take a checkpoint's EMA weights where it has them.

    Raises:
        PretrainedError: unreadable file, or a key that is missing, unknown or of another shape.
    """
    if isinstance(source, Mapping):
        name, tensors = "tensors", dict(source)
    else:
        name, tensors = str(source), _read(source, ema)[0]
    work = _Import(name, {_without_prefix(key): value for key, value in tensors.items()})
    kept = set(detector.kept_blocks)
    for key in work.tensors:
        block = re.match(_BLOCK, key)
        if block and int(block["index"]) not in kept:
            work.ignore(key, f"block {block['index']} is dropped")
        elif _LORA.match(key) and not merge_lora:
            work.ignore(key, "merge_lora is off")
    if not detector.config.backbone.unused_norm:
        for part in ("weight", "bias"):
            work.ignore(f"backbone.model.backbone.fc_norm.{part}", "no forward uses it")
    work.ignore("projection.pos_embed", "computed from its formula")
    for ours in detector.state_dict():
        work.values[ours] = work.take(opentad_key(ours))
    if merge_lora:
        _merge_lora(work)
    return work.write(detector)


def to_opentad(detector: Detector) -> dict[str, Tensor]:
    """The detector's tensors under OpenTAD's names: the inverse of `load_opentad`."""
    return {opentad_key(name): tensor.detach() for name, tensor in detector.state_dict().items()}


def _merge_lora(work: _Import) -> None:
    pairs = {(m["index"], m["layer"]) for key in work.tensors if (m := _LORA.match(key))}
    for index, layer in sorted(pairs):
        target = f"backbone.blocks.{index}.attn.{layer}.weight"
        if target in work.values:
            prefix = f"backbone.model.backbone.blocks.{index}.attn.lora_{layer}."
            a, b, weight = work.take(f"{prefix}A"), work.take(f"{prefix}B"), work.values[target]
            if (a.shape[0], b.shape[-1]) != (weight.shape[1], weight.shape[0]) or a.shape[1] != b.shape[0]:
                raise PretrainedError(
                    f"{work.source}: LoRA factors of '{target}' have shapes {list(a.shape)}, {list(b.shape)}"
                )
            work.values[target] = weight + (a @ b).T


def _without_prefix(key: str) -> str:
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _read(path: str | Path, ema: bool = True) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of a .safetensors file or of a checkpoint without pickled code."""
    path = Path(path)
    if not path.is_file():
        raise PretrainedError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise PretrainedError(f"{path}: not a safetensors file: {_one_line(error)}") from None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file it cannot or must not read
        raise PretrainedError(f"{path}: cannot be read as weights only: {_one_line(error)}") from None
    for key in ("state_dict_ema", "state_dict") if ema else ("state_dict",):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise PretrainedError(f"{path}: expected a mapping of names to tensors")
    return dict(content), {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
