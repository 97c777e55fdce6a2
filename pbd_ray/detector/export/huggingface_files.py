"""The backbone as transformers' VideoMAEModel."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from pbd_ray.config import BackboneConfig
from pbd_ray.detector.bundle import Bundle, BundleError
from pbd_ray.detector.export.format import Forward
from pbd_ray.detector.points import sinusoid_table
from pbd_ray.detector.videomae import NORM_EPS, VideoMAE
from pbd_ray.detector.vit_layouts import OLDER_HUGGING_FACE_VIDEOMAE
from pbd_ray.detector.vit_weights import backbone_tensors, load_backbone

_TABLE_ERROR = 1e-5
"""By which a table may miss the formula: files hold it as float32, computed in one way or another."""


def write_huggingface(bundle: Bundle, folder: Path) -> None:
    """config.json (VideoMAEConfig) and model.safetensors.

    Raises:
        BundleError: VideoMAEModel cannot be this backbone.
    """
    backbone, config = bundle.detector.backbone, bundle.config.backbone
    if config.activation != "gelu":
        raise BundleError(f"huggingface: backbone.activation is {config.activation}, expected gelu")
    _check_positions(backbone)
    text = json.dumps(videomae_config(config), indent=2)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")
    # Names that every release reads: of the newer ones release 4 would leave out the biases, with a warning.
    tensors = backbone_tensors(backbone, OLDER_HUGGING_FACE_VIDEOMAE)
    content = tensors_to_bytes(tensors, metadata={"format": "pt"})  # transformers asks for it
    (folder / "model.safetensors").write_bytes(content)


def read_huggingface(folder: Path, bundle: Bundle) -> Forward:
    """The backbone in the files, through the importer of pretrained weights, under the bundle's head."""
    detector = copy.deepcopy(bundle.detector)
    with torch.random.fork_rng(devices=[]):
        detector.backbone = VideoMAE(bundle.config.backbone, bundle.config.grid).eval()
    load_backbone(detector.backbone, folder / "model.safetensors")
    return detector


def videomae_config(config: BackboneConfig) -> dict[str, object]:
    """VideoMAEConfig's fields of a backbone without gaps."""
    return {
        "model_type": "videomae",
        "architectures": ["VideoMAEModel"],
        "image_size": config.position_table_pixels,
        "patch_size": config.patch_pixels,
        "num_channels": 3,
        "num_frames": config.chunk_frames,
        "tubelet_size": config.tubelet_frames,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "qkv_bias": True,  # of query and value; newer releases call it `qv_bias` and read both
        "use_mean_pooling": not config.final_norm,
    }


def _check_positions(backbone: VideoMAE) -> None:
    """The layout has no position table: transformers computes it, for the size in the config."""
    table: Tensor = backbone.position_table
    error = float((table - sinusoid_table(table.shape[1], table.shape[2])).abs().max())
    if error > _TABLE_ERROR:
        raise BundleError(
            f"huggingface: backbone.position_table is up to {error:.2g} from the sin-cos formula, and "
            "VideoMAEModel has no other table"
        )
