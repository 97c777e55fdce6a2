"""The head: ActionFormer (arXiv 2202.07925), a convolutional transformer over a feature pyramid.

All features are (B, C, T) with a (B, T) mask, True where a step is real. Convolutions set what they
compute at padded steps to zero; attention does not look at padded keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from pbd_ray.config import HeadConfig
from pbd_ray.detector.points import pyramid_points, sinusoid_table

RESIDUAL_SCALE_INIT = 1e-4
CONV_NORM_EPS = 1e-6
"""Of the norms after convolutions and of the neck; those inside transformer layers use 1e-5."""


@dataclass(frozen=True, eq=False)
class HeadOutput:
    """What the head says at the P points of all levels, finest level first."""

    logits: Tensor
    """(B, P, C), before the sigmoid."""
    offsets: Tensor
    """(B, P, 2) >= 0: distances to start and end in units of the level's stride."""
    mask: Tensor
    """(B, P) bool: the point lies in the video."""
    points: Tensor
    """(P, 4): t, low, high, stride (`points.pyramid_points`)."""


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """(B, C, T) with the padded steps set to zero."""
    return x * mask.unsqueeze(1).to(x.dtype)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ConvNorm(nn.Module):
    """Convolution of 3 steps, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = ChannelNorm(outputs, eps=CONV_NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return zero_padding(F.relu(self.norm(self.conv(x))), mask)


class Attention(nn.Module):
    """Multi-head attention whose query, key and value come out of depthwise convolutions.

    With stride 2 the convolutions halve the sequence. `window` >= 0 keeps every query to the keys at
    most window // 2 steps away; -1 is global attention.
    """

    def __init__(self, channels: int, num_heads: int, window: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.stride = stride
        for name in ("query", "key", "value"):
            conv = nn.Conv1d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)
            self.add_module(f"{name}_conv", conv)
            self.add_module(f"{name}_norm", ChannelNorm(channels))
            self.add_module(name, pointwise(channels, channels))
        self.proj = pointwise(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, C, T), mask (B, T // stride) of the output -> (B, C, T // stride)."""
        query, key, value = (self._project(name, x, mask) for name in ("query", "key", "value"))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self._visible(mask))
        merged = attended.transpose(2, 3).flatten(1, 2)
        return zero_padding(self.dropout(self.proj(merged)), mask)

    def _project(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        convolved = zero_padding(self.get_submodule(f"{name}_conv")(x), mask)
        normed = self.get_submodule(f"{name}_norm")(convolved)
        projected: Tensor = self.get_submodule(name)(normed)
        batch, _, length = projected.shape
        return projected.reshape(batch, self.num_heads, -1, length).transpose(2, 3)

    def _visible(self, mask: Tensor) -> Tensor:
        """(B, 1, T, T) bool, True where a query may look at a key."""
        length = mask.shape[1]
        step = torch.arange(length, device=mask.device)
        distance = (step[:, None] - step[None, :]).abs()
        near = distance <= (length if self.window < 0 else self.window // 2)
        # A padded query sees at least itself: a softmax over nothing would be NaN, and NaN * 0 is NaN.
        return ((mask[:, None, :] & near) | (distance == 0)).unsqueeze(1)


def pointwise(inputs: int, outputs: int) -> nn.Conv1d:
    """A linear layer at every step, bias zero at the start."""
    conv = nn.Conv1d(inputs, outputs, 1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ResidualScale(nn.Module):
    """Learned scale a channel on a residual branch, then drop path over whole samples."""

    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, channels, 1), RESIDUAL_SCALE_INIT))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.drop_path(self.scale * x)
        return dropped


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP; with stride 2 the residual is max-pooled to the shorter sequence."""

    def __init__(self, config: HeadConfig, stride: int) -> None:
        super().__init__()
        channels = config.channels
        self.norm1 = ChannelNorm(channels)
        self.attention = Attention(
            channels, config.num_heads, config.attention_window_steps, stride, config.dropout
        )
        self.skip = nn.MaxPool1d(3, stride=2, padding=1) if stride == 2 else nn.Identity()
        self.attention_scale = ResidualScale(channels, config.drop_path)
        self.norm2 = ChannelNorm(channels)
        self.mlp = nn.Sequential(
            pointwise(channels, 4 * channels),
            nn.GELU(),
            nn.Dropout(config.dropout),
            pointwise(4 * channels, channels),
            nn.Dropout(config.dropout),
        )
        self.mlp_scale = ResidualScale(channels, config.drop_path)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, C, T), mask (B, T // stride) of the output -> (B, C, T // stride)."""
        x = zero_padding(self.skip(x), mask) + self.attention_scale(self.attention(self.norm1(x), mask))
        mixed: Tensor = x + self.mlp_scale(zero_padding(self.mlp(self.norm2(x)), mask))
        return mixed


class ActionFormer(nn.Module):
    """Feature sequence to class logits and boundary offsets at every point of the pyramid.

    Args:
        config: sizes and priors.
        input_channels: channels of the features, the backbone's embed_dim.
        feature_steps: length of the features.
        num_classes: C.

    Attributes:
        loss_normalizer: float buffer, running mean of the positives in a batch (`losses`).
        mask_input: set padded steps of the features to zero before the first convolution. The
            paper's release does not and lets padded frames leak in; False reproduces that.
    """

    points: Tensor
    loss_normalizer: Tensor
    position_table: Tensor | None

    def __init__(self, config: HeadConfig, input_channels: int, feature_steps: int, num_classes: int) -> None:
        super().__init__()
        self.mask_input = True
        channels = config.channels
        widths = [input_channels] + [channels] * config.embedding_layers
        self.embedding = nn.ModuleList(ConvNorm(a, b) for a, b in pairwise(widths))
        self.stem = nn.ModuleList(TransformerLayer(config, stride=1) for _ in range(config.stem_layers))
        self.branch = nn.ModuleList(TransformerLayer(config, stride=2) for _ in range(config.levels - 1))
        self.level_norms = nn.ModuleList(
            ChannelNorm(channels, eps=CONV_NORM_EPS) for _ in range(config.levels)
        )
        self.class_layers = nn.ModuleList(ConvNorm(channels, channels) for _ in range(config.head_layers))
        self.class_output = nn.Conv1d(channels, num_classes, 3, padding=1)
        self.boundary_layers = nn.ModuleList(ConvNorm(channels, channels) for _ in range(config.head_layers))
        self.boundary_output = nn.Conv1d(channels, 2, 3, padding=1)
        self.boundary_scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(config.levels))
        assert self.class_output.bias is not None and self.boundary_output.bias is not None
        # Start at the prior of a rare foreground (RetinaNet, section 4.1), or background swamps epoch one.
        nn.init.constant_(self.class_output.bias, math.log(config.class_prior / (1 - config.class_prior)))
        nn.init.zeros_(self.boundary_output.bias)
        table = sinusoid_table(feature_steps, channels).T[None] / math.sqrt(channels)
        self.register_buffer("position_table", table if config.position_table else None, persistent=False)
        points = pyramid_points(feature_steps, config.regression_ranges)
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("loss_normalizer", torch.tensor(float(config.normalizer_init)))

    def pyramid(self, features: Tensor, mask: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Embed and mix the sequence: one (features (B, channels, T_l), mask (B, T_l)) a level."""
        x = zero_padding(features, mask) if self.mask_input else features
        for layer in self.embedding:
            x = layer(x, mask)
        if self.position_table is not None:
            x = x + zero_padding(self.position_table, mask)
        for layer in self.stem:
            x = layer(x, mask)
        levels = [(x, mask)]
        for layer in self.branch:
            mask = mask[:, ::2]
            x = layer(x, mask)
            levels.append((x, mask))
        return tuple(levels)

    def neck(self, levels: tuple[tuple[Tensor, Tensor], ...]) -> tuple[tuple[Tensor, Tensor], ...]:
        """A norm of its own for every level; nothing flows between levels."""
        return tuple((norm(x), mask) for norm, (x, mask) in zip(self.level_norms, levels, strict=True))

    def classify(self, x: Tensor, mask: Tensor) -> Tensor:
        """One level (B, channels, T_l) -> logits (B, T_l, C)."""
        for layer in self.class_layers:
            x = layer(x, mask)
        logits: Tensor = self.class_output(x)
        return logits.transpose(1, 2)

    def bound(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        """One level (B, channels, T_l) -> offsets (B, T_l, 2) in strides, not negative."""
        for layer in self.boundary_layers:
            x = layer(x, mask)
        return F.relu(self.boundary_output(x) * scale).transpose(1, 2)

    def forward(self, features: Tensor, mask: Tensor) -> HeadOutput:
        """features (B, input_channels, feature_steps), mask (B, feature_steps) bool -> HeadOutput."""
        levels = self.neck(self.pyramid(features, mask))
        offsets = [self.bound(x, m, s) for (x, m), s in zip(levels, self.boundary_scales, strict=True)]
        return HeadOutput(
            logits=torch.cat([self.classify(x, m) for x, m in levels], dim=1),
            offsets=torch.cat(offsets, dim=1),
            mask=torch.cat([m for _, m in levels], dim=1),
            points=self.points,
        )
