"""What a pretrained ViT does before its first block, for the backbone: patch embedding and positions.

The embedding of an image ViT is inflated: its kernels spread over the tubelet, its positions repeated
over time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pbd_ray.detector.points import sinusoid_table
from pbd_ray.detector.pretrained import Import, PretrainedError
from pbd_ray.detector.videomae import VideoMAE, resize_positions
from pbd_ray.detector.vit_facts import IMAGENET_MEAN, IMAGENET_STD, Facts
from pbd_ray.detector.vit_layouts import Layout

_VIDEOMAE_PIXELS, _VIDEOMAE_FRAMES = 224, 16
"""What every published VideoMAE was trained on: its position table is the formula's for this size."""


def take_embedding(work: Import, layout: Layout, facts: Facts, backbone: VideoMAE) -> None:
    """Patch embedding and position table.

    Raises:
        PretrainedError: another shape, or positions of anything but square images.
    """
    config, steps = backbone.config, backbone.chunk_steps
    kernel = work.take(f"{layout.prefix}{layout.patches}.weight")
    bias = work.take(f"{layout.prefix}{layout.patches}.bias", config.embed_dim)
    image = kernel.ndim == 4
    if image:
        kernel = resize_patch_kernel(kernel, config.patch_pixels) / config.tubelet_frames
        kernel = kernel.unsqueeze(2).repeat(1, 1, config.tubelet_frames, 1, 1)
    if (facts.pixel_mean, facts.pixel_std) != (IMAGENET_MEAN, IMAGENET_STD):
        kernel, bias = _for_our_pixels(kernel, bias, facts)
    work.values["patch_embed.weight"], work.values["patch_embed.bias"] = kernel, bias
    if image:
        table = _image_positions(work, layout)
    else:
        table = _video_positions(work, layout, facts, backbone)
    side = config.position_table_pixels // config.patch_pixels
    table = resize_positions(table, 1 if image else steps, side, side)
    work.values["position_table"] = table.repeat(1, steps, 1) if image else table


def _for_our_pixels(kernel: Tensor, bias: Tensor, facts: Facts) -> tuple[Tensor, Tensor]:
    """The same answer to pixels normalised as the backbone does it: their x is a * ours + b."""
    std = torch.tensor(facts.pixel_std)
    a = torch.tensor(IMAGENET_STD) / std
    b = (torch.tensor(IMAGENET_MEAN) - torch.tensor(facts.pixel_mean)) / std
    return kernel * a.view(3, 1, 1, 1), bias + kernel.sum(dim=(2, 3, 4)) @ b


def _image_positions(work: Import, layout: Layout) -> Tensor:
    """(1, side * side, d): rows of the tokens before the patches, if there are any, left out."""
    assert layout.positions is not None
    table = _table(work, layout)
    # None of these tokens may have a row, or the first (the class token), or all of them.
    counts = [0]
    for name in layout.prefix_tokens:
        tokens = work.tensors.get(f"{layout.prefix}{name}")
        if tokens is not None:
            counts.append(counts[-1] + (tokens.shape[1] if tokens.ndim == 3 else 1))
    for count in counts:
        if _is_square(table.shape[1] - count):
            return table[:, count:]
    raise PretrainedError(
        f"{work.source}: {table.shape[1] - counts[min(1, len(counts) - 1)]} positions are not a square image"
    )


def _video_positions(work: Import, layout: Layout, facts: Facts, backbone: VideoMAE) -> Tensor:
    """(1, steps * side * side, d): the file's table, or the formula's for the size it was trained on."""
    config, steps = backbone.config, backbone.chunk_steps
    if layout.positions is not None and f"{layout.prefix}{layout.positions}" in work.tensors:
        table = _table(work, layout)
        if table.shape[1] % steps or not _is_square(table.shape[1] // steps):
            raise PretrainedError(
                f"{work.source}: {table.shape[1]} positions are not {steps} steps of a square image "
                f"(backbone.chunk_frames {config.chunk_frames})"
            )
        return table
    frames = facts.frames or _VIDEOMAE_FRAMES
    if frames != config.chunk_frames:
        raise PretrainedError(
            f"{work.source}: was trained on clips of {frames} frames, "
            f"backbone.chunk_frames is {config.chunk_frames}"
        )
    side = (facts.image_pixels or _VIDEOMAE_PIXELS) // config.patch_pixels
    return sinusoid_table(steps * side * side, config.embed_dim)[None]


def _table(work: Import, layout: Layout) -> Tensor:
    table = work.take(f"{layout.prefix}{layout.positions}")
    width = work.values["patch_embed.weight"].shape[0]
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != width:
        raise PretrainedError(
            f"{work.source}: tensor '{layout.prefix}{layout.positions}' has shape {list(table.shape)}, "
            f"expected [1, positions, {width}]"
        )
    return table


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


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
