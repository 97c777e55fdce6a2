"""LoRA through peft, and which parameters train (design, section 2, "What trains").

The update is W + A B as in the paper's release: lora_alpha = r (scale 1), A ~ N(0, std 1/sqrt(r)), B = 0.
peft's own initialisations differ, so ours is written explicitly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from pbd_ray.config import AlignmentConfig, Trainable
from pbd_ray.detector.detector import Detector

_ADAPTER = "default"


def prepare_student(detector: Detector, config: AlignmentConfig, generator: torch.Generator) -> None:
    """Add LoRA where the mode wants it and leave exactly the trainable set requiring gradients.

    Shapes: A is (r, in), B is (out, r) in peft's layout, on `attn.qkv` and `attn.proj` of every kept
    block; r = `config.rank` or embed_dim / 4.
    """
    if config.trainable in ("lora", "lora_only"):
        rank = config.rank or detector.config.backbone.embed_dim // 4
        _add_lora(detector, rank, generator)
    set_trainable(detector, config.trainable)


def set_trainable(detector: Detector, mode: Trainable) -> None:
    """lora: LoRA factors, block LayerNorms, patch embedding and the whole head; full: everything;
    head: the head and the final norm, if there is one; lora_only: the factors alone (paper, F.4);
    none: nothing (Table E)."""
    for name, parameter in detector.named_parameters():
        parameter.requires_grad_(_trains(name, mode))


def merge_lora(detector: Detector) -> None:
    """Fold every LoRA pair into its weight and remove the adapters.

    Raises:
        ValueError: a merged weight is not finite.
    """
    for parent, name, layer in list(_lora_layers(detector)):
        layer.merge(safe_merge=True)
        setattr(parent, name, layer.get_base_layer())


def _trains(name: str, mode: Trainable) -> bool:
    if mode == "none":
        return False
    if mode == "full":
        # The release's unused norm gets no gradient; DDP must not wait for one.
        return ".fc_norm." not in name
    if "lora_" in name:
        return True
    if mode == "lora_only":
        return False
    in_backbone = name.startswith("backbone.")
    if mode == "head":
        return not in_backbone or name.startswith("backbone.norm.")
    block_norm = ".blocks." in name and (".norm1." in name or ".norm2." in name)
    return not in_backbone or block_norm or ".patch_embed." in name


def _add_lora(detector: Detector, rank: int, generator: torch.Generator) -> None:
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=["attn.qkv", "attn.proj"]
    )
    inject_adapter_in_model(config, detector.backbone, adapter_name=_ADAPTER)
    with torch.no_grad():
        for _, _, layer in _lora_layers(detector):
            factor_a = layer.lora_A.get_parameter(f"{_ADAPTER}.weight")
            factor_b = layer.lora_B.get_parameter(f"{_ADAPTER}.weight")
            noise = torch.randn(factor_a.shape, generator=generator)
            factor_a.copy_(noise / math.sqrt(rank))
            factor_b.zero_()


def _lora_layers(detector: Detector) -> Iterator[tuple[nn.Module, str, LoraLayer]]:
    for parent in detector.backbone.modules():
        for name, child in parent.named_children():
            if isinstance(child, LoraLayer):
                yield parent, name, child
