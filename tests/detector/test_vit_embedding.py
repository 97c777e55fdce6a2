"""Resized patch kernels answer as before."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pbd_ray.detector.vit_embedding import resize_patch_kernel


def test_larger_patches_answer_the_resized_image_alike() -> None:
    kernel, patches = torch.randn(5, 3, 14, 14), torch.randn(7, 3, 14, 14)
    resized = F.interpolate(patches, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(
        F.conv2d(resized, resize_patch_kernel(kernel, 16)), F.conv2d(patches, kernel), rtol=1e-3, atol=1e-3
    )
    assert resize_patch_kernel(kernel, 14) is kernel


def test_smaller_patches_keep_the_answer_to_smooth_images() -> None:
    kernel = torch.randn(5, 3, 14, 14)
    row = torch.linspace(-1, 1, 14)
    ramp = (row[:, None] + 0.5 * row).expand(1, 3, 14, 14)
    small = F.interpolate(ramp, size=(8, 8), mode="bicubic", align_corners=False, antialias=True)
    answer, expected = F.conv2d(small, resize_patch_kernel(kernel, 8)), F.conv2d(ramp, kernel)
    assert (answer - expected).norm() < 0.15 * expected.norm()


def test_softmax_does_not_see_a_key_bias() -> None:
    query, key, value, bias = torch.randn(4, 2, 3, 50, 8, dtype=torch.float64)
    plain = F.scaled_dot_product_attention(query, key, value)
    shifted = F.scaled_dot_product_attention(query, key + bias[:, :, :1], value)
    torch.testing.assert_close(plain, shifted, rtol=1e-12, atol=1e-12)
