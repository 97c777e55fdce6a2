"""A checkpoint that OpenTAD's `tools/test.py` loads, its config and its class map."""

from __future__ import annotations

from pathlib import Path

import torch

from pbd_ray.detector.bundle import Bundle
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.export.format import Forward
from pbd_ray.detector.export.opentad_config import opentad_config
from pbd_ray.detector.opentad import ROOT, load_opentad, to_opentad

CHECKPOINT = "checkpoint.pth"


def write_opentad(bundle: Bundle, folder: Path) -> None:
    """checkpoint.pth, config.py and category_idx.txt.

    Raises:
        BundleError: OpenTAD's modules cannot be this detector.
    """
    title = f"ActionFormer on VideoMAE with {len(bundle.kept_blocks)} blocks, {len(bundle.classes)} classes."
    config = opentad_config(bundle.config, bundle.classes, title)
    tensors = to_opentad(bundle.detector)
    if not bundle.config.backbone.unused_norm and not bundle.config.backbone.final_norm:
        # OpenTAD builds it and wants it in the file, though with `return_feat_map` no forward uses it.
        dim = bundle.config.backbone.embed_dim
        tensors |= {f"{ROOT}fc_norm.weight": torch.ones(dim), f"{ROOT}fc_norm.bias": torch.zeros(dim)}
    # OpenTAD loads into a DistributedDataParallel, whose names begin so, and takes the EMA weights.
    state = {f"module.{name}": tensor.clone() for name, tensor in tensors.items()}
    torch.save({"epoch": 0, "state_dict": state, "state_dict_ema": state}, folder / CHECKPOINT)
    (folder / "config.py").write_text(config, encoding="utf-8")
    (folder / "category_idx.txt").write_text("".join(f"{name}\n" for name in bundle.classes), "utf-8")


def read_opentad(folder: Path, bundle: Bundle) -> Forward:
    """The detector in the checkpoint, through the importer of OpenTAD's checkpoints."""
    with torch.random.fork_rng(devices=[]):  # building draws initial weights; loading must not
        detector = Detector(bundle.config, len(bundle.classes)).eval()
    load_opentad(detector, folder / CHECKPOINT)
    return detector
