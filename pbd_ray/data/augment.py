"""Pixels of a clip: crop, flip, jitter (design, section 2, training pixels).

Every draw holds for all frames of a clip, so that motion stays what it was.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from pbd_ray.config import GridConfig

_GENERATOR = threading.Lock()


def inference_clip(frames: npt.NDArray[np.uint8], grid: GridConfig) -> torch.Tensor:
    """Centre crop: frames (T, H, W, 3) to uint8 (3, T, S, S), S = grid.crop_pixels.

    Frames with a side shorter than the crop are enlarged to cover it: no padding, which no detector has seen.
    """
    clip: torch.Tensor = functional.center_crop(_covering(frames, grid.crop_pixels), [grid.crop_pixels] * 2)
    return clip.transpose(0, 1)


def training_clip(frames: npt.NDArray[np.uint8], grid: GridConfig, seed: int) -> torch.Tensor:
    """Augment frames (T, H, W, 3) to uint8 (3, T, S, S) as grid.augmentation says, by `seed` alone.

    full: random resized crop, flip, RandAugment, colour jitter. flip: centre crop, flip. none: centre crop.

    torchvision draws from torch's global CPU generator: it is set for the call and put back after it.
    Threads that augment take turns; no other thread may draw from it (train) meanwhile.
    """
    if grid.augmentation == "none":
        return inference_clip(frames, grid)
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the GPUs' generators too, which are not put back.
        torch.default_generator.manual_seed(seed)
        clip: torch.Tensor = _transforms(grid)(_covering(frames, grid.crop_pixels))
    return clip.transpose(0, 1)


def _transforms(grid: GridConfig) -> v2.Compose:
    flip = v2.RandomHorizontalFlip(p=0.5)
    if grid.augmentation == "flip":
        return v2.Compose([v2.CenterCrop(grid.crop_pixels), flip])
    return v2.Compose(
        [
            v2.RandomResizedCrop(grid.crop_pixels, antialias=True),  # 8-100 % of the area, aspect 3/4-4/3
            flip,
            # Shear, shift, rotation and colour; the release's (ImgAug) is the same idea, and stronger.
            v2.RandAugment(num_ops=2, magnitude=9),
            v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1),
        ]
    )


def _covering(frames: npt.NDArray[np.uint8], crop_pixels: int) -> torch.Tensor:
    """Frames as a uint8 tensor (T, 3, H, W), both sides at least `crop_pixels`."""
    clip = torch.from_numpy(np.require(frames, requirements=["C", "W"])).permute(0, 3, 1, 2)
    if min(clip.shape[-2:]) >= crop_pixels:
        return clip
    resized: torch.Tensor = functional.resize(clip, [crop_pixels], antialias=True)
    return resized
