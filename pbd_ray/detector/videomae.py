"""The backbone: VideoMAE's video transformer (arXiv 2203.12602) on timm's blocks.

Differences from an image ViT: tubelets instead of patches, a fixed sin-cos position table over
(time, row, column), no class token, no key bias, no final norm (`final_norm` brings it back for a
backbone that starts as an image ViT). A long clip runs in chunks of `chunk_frames` frames; attention
never crosses a chunk.

A *block* is one whole transformer layer and keeps its original index for ever: `blocks` holds the
kept ones under their index, and a dropped block is simply not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pbd_ray.config import BackboneConfig, GridConfig
from pbd_ray.detector.points import sinusoid_table

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
NORM_EPS = 1e-6


class BlockNorm(nn.LayerNorm):
    """LayerNorm with VideoMAE's epsilon."""

    def __init__(
        self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, eps=NORM_EPS, device=device, dtype=dtype)


class Attention(nn.Module):
    """Self-attention of a VideoMAE block: query and value have a bias, the key has none.

    `qkv` and `proj` are called as modules and the bias is added outside, so that LoRA can wrap both.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, d) -> (B, N, d). timm's Block passes the two mask arguments; chunks need neither."""
        assert attn_mask is None and not is_causal
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = (self.qkv(x) + bias).reshape(*x.shape[:2], 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


def build_block(config: BackboneConfig, index: int) -> Block:
    """Block `index` of the uncompressed backbone; its drop path rate follows from the original index."""
    rates = torch.linspace(0, config.drop_path, config.depth, device="cpu", dtype=torch.float64).tolist()
    block = Block(
        config.embed_dim,
        config.num_heads,
        mlp_ratio=config.mlp_ratio,
        drop_path=rates[index],
        act_layer=nn.GELU if config.activation == "gelu" else nn.ReLU,
        norm_layer=BlockNorm,
    )
    block.attn = Attention(config.embed_dim, config.num_heads)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return block


class VideoMAE(nn.Module):
    """Frames to a sequence of features.

    Args:
        config: the uncompressed architecture.
        grid: gives `feature_steps`, the length of the output.
        kept_blocks: original indices of the blocks that are there; None: all `config.depth`.

    Attributes:
        blocks: kept blocks under str(original index), ascending.
        position_table: (1, steps * rows * columns, d) buffer, made for `position_table_pixels`;
            an importer may overwrite its values.
        checkpointing: recompute activations in the backward pass; may be set at any time.
    """

    blocks: nn.ModuleDict
    position_table: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, config: BackboneConfig, grid: GridConfig, kept_blocks: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        kept = tuple(range(config.depth) if kept_blocks is None else kept_blocks)
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= config.depth:
            raise ValueError(
                f"kept_blocks {list(kept)} must be ascending original indices of {config.depth} blocks"
            )
        self.config = config
        self.feature_steps = grid.feature_steps
        self.checkpointing = False
        kernel = (config.tubelet_frames, config.patch_pixels, config.patch_pixels)
        self.patch_embed = nn.Conv3d(3, config.embed_dim, kernel, stride=kernel)
        self.blocks = nn.ModuleDict({str(index): build_block(config, index) for index in kept})
        if config.final_norm:
            self.norm = BlockNorm(config.embed_dim)
        if config.unused_norm:
            # No forward touches it and DDP refuses parameters without a gradient, hence frozen.
            self.fc_norm = BlockNorm(config.embed_dim).requires_grad_(False)
        side = config.position_table_pixels // config.patch_pixels
        table = sinusoid_table(self.chunk_steps * side * side, config.embed_dim)
        self.register_buffer("position_table", table[None])
        shape = (1, 3, 1, 1, 1)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(shape), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(shape), persistent=False)

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Original indices of the blocks that are there, ascending."""
        return tuple(int(index) for index in self.blocks)

    @property
    def chunk_steps(self) -> int:
        """Token time steps of one chunk."""
        return self.config.chunk_frames // self.config.tubelet_frames

    def embed(self, frames: Tensor) -> Tensor:
        """Pixels to tokens of block 0's input.

        Args:
            frames: (B, 3, T, H, W) RGB on the 0..255 scale, uint8 or float; T a multiple of
                `chunk_frames`, H and W of `patch_pixels`.

        Returns:
            (B * chunks, N, d), tokens ordered time, row, column.
        """
        batch, channels, length, height, width = frames.shape
        assert channels == 3 and length % self.config.chunk_frames == 0, frames.shape
        assert height % self.config.patch_pixels == 0 and width % self.config.patch_pixels == 0, frames.shape
        chunks = frames.reshape(batch, channels, -1, self.config.chunk_frames, height, width)
        chunks = chunks.transpose(1, 2).flatten(0, 1)
        pixels = (chunks.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        tokens: Tensor = self.patch_embed(pixels)
        rows, columns = tokens.shape[-2:]
        return tokens.flatten(2).transpose(1, 2) + self.positions(rows, columns)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table on a grid of rows x columns tokens: (1, steps * rows * columns, d)."""
        return resize_positions(self.position_table, self.chunk_steps, rows, columns)

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """One kept block: (B * chunks, N, d) -> (B * chunks, N, d)."""
        block = self.blocks[str(index)]
        if self.checkpointing and self.training and torch.is_grad_enabled():
            output: Tensor = checkpoint(block, tokens, use_reentrant=False)
        else:
            output = block(tokens)
        return output

    def pool(self, tokens: Tensor, batch_size: int) -> Tensor:
        """Final norm if there is one, mean over space, chunks put end to end, stretched linearly to the
        feature grid.

        Args:
            tokens: (batch_size * chunks, N, d).

        Returns:
            (batch_size, d, feature_steps).
        """
        dim = tokens.shape[-1]
        if self.config.final_norm:
            tokens = self.norm(tokens)
        steps = tokens.reshape(tokens.shape[0], self.chunk_steps, -1, dim).mean(dim=2)
        sequence = steps.reshape(batch_size, -1, dim).transpose(1, 2)
        return F.interpolate(sequence, size=self.feature_steps, mode="linear", align_corners=False)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 3, T, H, W) frames -> (B, d, feature_steps) features."""
        tokens = self.embed(frames)
        for index in self.kept_blocks:
            tokens = self.run_block(index, tokens)
        return self.pool(tokens, frames.shape[0])


def resize_positions(table: Tensor, steps: int, rows: int, columns: int) -> Tensor:
    """A position table of square images, interpolated bicubically to another grid of tokens.

    Args:
        table: (1, steps * side * side, d).

    Returns:
        (1, steps * rows * columns, d).
    """
    side = math.isqrt(table.shape[1] // steps)
    if (rows, columns) == (side, side):
        return table
    images = table.view(steps, side, side, -1).permute(0, 3, 1, 2)
    images = F.interpolate(images, size=(rows, columns), mode="bicubic", align_corners=False)
    return images.permute(0, 2, 3, 1).reshape(1, steps * rows * columns, -1)


def start_on_motion(backbone: VideoMAE) -> None:
    """Make half of the tubelet kernels strong temporal differences and the position table weak; in place.

    For training from scratch on classes that differ by motion. A random kernel answers mostly to what
    stands still, and the position table outweighs both: such a model stays on its first plateau for
    very long. Only a start: every kernel trains on.
    """
    with torch.no_grad():
        kernels = backbone.patch_embed.weight  # (d, 3, tubelet frames, patch, patch)
        frames = kernels.shape[2]
        differences = kernels[kernels.shape[0] // 2 :]
        differences[:, :, frames // 2 :] = -differences[:, :, : frames - frames // 2]
        kernels *= 2
        differences *= 4
        backbone.position_table *= 0.3
