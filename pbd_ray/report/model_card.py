"""README.md of an export: what the model is, what goes in, what comes out, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pbd_ray.config import DetectorConfig
from pbd_ray.detector.videomae import PIXEL_MEAN, PIXEL_STD
from pbd_ray.metrics.cost import CostReport


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a detector."""

    config: DetectorConfig
    classes: Sequence[str]
    depth: int
    """Before any block was dropped."""
    kept_blocks: Sequence[int]
    """Original indices."""
    cost: CostReport
    test_map: Mapping[float, float] | None
    """mAP by tIoU on the test videos; None: not known here."""
    weights: str
    """Hash of the bundle's weights."""


def model_card(format: str, facts: CardFacts) -> str:
    """The whole file."""
    return "\n".join((_what(facts), _input(facts.config), _HOW_TO_LOAD[format].format(**_values(facts))))


def _what(facts: CardFacts) -> str:
    depth, kept = facts.depth, facts.kept_blocks
    dropped = [block for block in range(depth) if block not in kept]
    gone = f"dropped: {', '.join(map(str, dropped))} (numbered from 0)" if dropped else "none dropped"
    head = facts.config.head
    lines = [
        "# Temporal action detector",
        "",
        f"ActionFormer ({head.channels} channels, {head.levels} levels) on VideoMAE "
        f"({facts.config.backbone.embed_dim} wide).",
        f"Blocks: {len(kept)} of {depth}, {gone}. In this export they are numbered 0 to {len(kept) - 1}.",
        "",
        "| | |",
        "|---|---|",
        f"| classes, in label order | {', '.join(_cell(name) for name in facts.classes)} |",
        f"| parameters of the whole detector | {facts.cost.parameters.total:,} |",
        f"| multiply-accumulates of a window, whole detector | {facts.cost.macs.total:,} |",
        f"| test mAP, whole detector | {_map(facts.test_map)} |",
        f"| weights of the bundle (SHA-256) | `{facts.weights}` |",
        "",
    ]
    return "\n".join(lines)


def _map(test_map: Mapping[float, float] | None) -> str:
    if test_map is None:
        return "not known to this export"
    return ", ".join(f"{value:.4f} at tIoU {tiou:g}" for tiou, value in sorted(test_map.items()))


def _cell(name: str) -> str:
    """Text that neither ends a table cell nor is markup."""
    return "".join(f"\\{c}" if c in "\\|`*_<>[]&" else c for c in name)


def _input(config: DetectorConfig) -> str:
    grid = config.grid
    if grid.kind == "sliding":
        window = (
            f"One frame of the video in {grid.stride_frames}, {grid.window_frames} a window; a share of "
            f"{grid.overlap:g} of a window lies in the next one, too"
        )
    else:
        window = f"The whole video as {grid.window_frames} frames, at the centres of equal bins"
    size = grid.crop_pixels
    return "\n".join(
        (
            "## Input",
            "",
            f"{window}.",
            f"The short side is scaled to {max(grid.test_short_side_pixels, size)} pixels and the centre "
            f"{size} x {size} cut out; RGB, 0 to 255.",
            f"Pixels are normalised by mean {list(PIXEL_MEAN)} and standard deviation {list(PIXEL_STD)}.",
            "",
        )
    )


def _values(facts: CardFacts) -> dict[str, object]:
    grid, backbone = facts.config.grid, facts.config.backbone
    return {
        "frames": grid.window_frames,
        "steps": grid.feature_steps,
        "pixels": grid.crop_pixels,
        "chunk": backbone.chunk_frames,
        "table": backbone.position_table_pixels,
        "times": backbone.chunk_frames // backbone.tubelet_frames,
        "side": backbone.position_table_pixels // backbone.patch_pixels,
        "cells": grid.crop_pixels // backbone.patch_pixels,
        "mean": list(PIXEL_MEAN),
        "std": list(PIXEL_STD),
    }


_HOW_TO_LOAD = {
    "safetensors": """\
## Load

A bundle of `pbd_ray`; `jobs/detect.py --bundle` and `jobs/evaluate.py --bundle` take it, too.

```python
import torch
from pbd_ray.detector.bundle import load_bundle

detector = load_bundle(".").detector
frames = torch.randint(0, 256, (1, 3, {frames}, {pixels}, {pixels}), dtype=torch.uint8)
mask = torch.ones(1, {steps}, dtype=torch.bool)  # False where the window has no video
with torch.no_grad():
    output = detector(frames, mask)
print(output.logits.shape, output.offsets.shape)
```

`pbd_ray.detector.postprocess` makes detections of it.
""",
    "opentad": """\
## Load

`config.py` and `checkpoint.pth` are for OpenTAD's `tools/test.py`. Set the paths at the top of `config.py`
first, and keep `category_idx.txt` beside it: OpenTAD writes a class map of its own where it finds none.

```
torchrun --nproc_per_node=1 tools/test.py FOLDER/config.py --checkpoint FOLDER/checkpoint.pth
```

The tensors are plain:

```python
import torch

state = torch.load("checkpoint.pth", weights_only=True)["state_dict"]
print(len(state), "tensors")
```

OpenTAD rounds seconds and scores before suppression and, in windows that are not full, does not blank the
features after the video's end before the head's first convolution. Its detections differ by that from those
of `pbd_ray`.
""",
    "huggingface": """\
## Load

The backbone alone, without the detection head, as a `VideoMAEModel` of transformers, for clips of {chunk}
frames. transformers computes positions for {table} x {table} pixels; the detector ran at {pixels} x {pixels},
with positions interpolated from {side} x {side} patches to {cells} x {cells}:

```python
import torch
import torch.nn.functional as F
from transformers import VideoMAEModel

table = VideoMAEModel.from_pretrained(".").embeddings.position_embeddings
images = table.view({times}, {side}, {side}, -1).permute(0, 3, 1, 2)
images = F.interpolate(images, size=({cells}, {cells}), mode="bicubic", align_corners=False)
model = VideoMAEModel.from_pretrained(".", image_size={pixels}).eval()
model.embeddings.position_embeddings = images.permute(0, 2, 3, 1).reshape(1, -1, table.shape[2])

frames = torch.randint(0, 256, (1, {chunk}, 3, {pixels}, {pixels}))  # RGB, 0 to 255
mean, std = (torch.tensor(v).view(1, 1, 3, 1, 1) for v in ({mean}, {std}))
with torch.no_grad():
    tokens = model((frames - mean) / std).last_hidden_state
print(tokens.shape)
```
""",
    "onnx": """\
## Load

`model.onnx` goes from pixels (uint8, normalised inside) to class logits and boundaries, for any batch size.

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
frames = np.random.randint(0, 256, (1, 3, {frames}, {pixels}, {pixels}), dtype=np.uint8)
mask = np.ones((1, {steps}), dtype=bool)  # False where the window has no video
logits, offsets, point_mask, points = session.run(None, {{"frames": frames, "mask": mask}})
scores = 1 / (1 + np.exp(-logits))
centre, stride = points[:, 0], points[:, 3]
start, end = centre - offsets[..., 0] * stride, centre + offsets[..., 1] * stride  # feature steps
print(scores.shape, start.shape)
```

A score counts where `point_mask` is True. The score threshold and the suppression of overlapping detections
are not in the graph; `pbd_ray.detector.postprocess` has them.
""",
}
