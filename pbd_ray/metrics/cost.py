"""What a detector costs: parameters, multiply-accumulates (MACs) and latency.

MACs count everything that multiplies a matrix: the tubelet convolution, every linear layer and
convolution, both attention products, the head. (The paper's absolute numbers leave operations out;
ratios compare.) They come twice, from a formula in the configuration and from a traced forward on
shapes alone; tests hold the two equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pbd_ray.config import DetectorConfig, Trainable


class DetectorLike(Protocol):
    """What of `detector.Detector` is looked at here; metrics and detector do not import each other."""

    config: DetectorConfig
    num_classes: int

    @property
    def kept_blocks(self) -> tuple[int, ...]: ...
    @property
    def backbone(self) -> nn.Module: ...
    @property
    def head(self) -> nn.Module: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True)
class Parameters:
    """Numbers of a detector; the parts add up to `total`."""

    total: int
    trainable: int
    """Those that require a gradient now."""
    blocks: int
    """Attention and MLP of the kept blocks, without norms and LoRA."""
    block_norms: int
    lora: int
    patch_embedding: int
    final_norm: int
    unused_norm: int
    """The release's `fc_norm`, which no forward uses (design, section 2)."""
    head: int


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one window."""

    patch_embedding: int
    blocks: dict[int, int]
    """Original index of each kept block -> its share."""
    head: int

    @property
    def backbone(self) -> int:
        return self.patch_embedding + sum(self.blocks.values())

    @property
    def total(self) -> int:
        return self.backbone + self.head


@dataclass(frozen=True)
class CostReport:
    parameters: Parameters
    macs: Macs


@dataclass(frozen=True)
class TrainableParameters:
    """The backbone's trainable parameters (paper, Table F; there in units of 2^20, truncated)."""

    lora: int
    block_norms: int
    patch_embedding: int
    final_norm: int
    unused_norm: int
    """Counted by Table F, though nothing trains it."""
    attention_and_mlp: int

    @property
    def total(self) -> int:
        norms = self.block_norms + self.final_norm + self.unused_norm
        return self.lora + norms + self.patch_embedding + self.attention_and_mlp


@dataclass(frozen=True)
class Latency:
    """Wall-clock milliseconds of one call."""

    p50_ms: float
    p95_ms: float
    repeats: int
    threads: int


def cost_report(detector: DetectorLike) -> CostReport:
    """Parameters and MACs of a detector as it is: its kept blocks, its LoRA if not merged."""
    return CostReport(
        parameters=count_parameters(detector),
        macs=window_macs(
            detector.config, detector.kept_blocks, detector.num_classes, lora_rank=_lora_rank(detector)
        ),
    )


def count_parameters(detector: DetectorLike) -> Parameters:
    """Count a `Detector`'s parameters by part, from their names."""
    names = ("blocks", "block_norms", "lora", "patch_embedding", "final_norm", "unused_norm", "head")
    parts = dict.fromkeys(names, 0)
    trainable = 0
    for name, parameter in detector.named_parameters():
        parts[_part(name)] += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return Parameters(total=sum(parts.values()), trainable=trainable, **parts)


def trainable_parameters(
    config: DetectorConfig, kept_blocks: Sequence[int], mode: Trainable, rank: int | None = None
) -> TrainableParameters:
    """Backbone parameters an alignment mode trains, by formula (design, section 2, "What trains").

    Args:
        rank: LoRA rank; None: embed_dim / 4.
    """
    dim, blocks = config.backbone.embed_dim, len(kept_blocks)
    rank = rank or dim // 4
    hidden = int(dim * config.backbone.mlp_ratio)
    has_lora, has_rest = mode in ("lora", "lora_only"), mode in ("lora", "full")
    attention = 3 * dim * dim + 2 * dim + dim * dim + dim  # qkv with q and v bias, projection
    mlp = 2 * dim * hidden + hidden + dim
    return TrainableParameters(
        lora=blocks * _lora_weights(dim, rank) if has_lora else 0,
        block_norms=blocks * 4 * dim if has_rest else 0,
        patch_embedding=_patch_values(config) * dim + dim if has_rest else 0,
        final_norm=2 * dim if mode in ("full", "head") and config.backbone.final_norm else 0,
        unused_norm=2 * dim if has_rest and config.backbone.unused_norm else 0,
        attention_and_mlp=blocks * (attention + mlp) if mode == "full" else 0,
    )


def window_macs(
    config: DetectorConfig, kept_blocks: Sequence[int], num_classes: int, lora_rank: int | None = None
) -> Macs:
    """MACs of one window by formula.

    Args:
        lora_rank: of LoRA that is not merged, so runs beside its layers; None: merged or none.
    """
    grid, backbone = config.grid, config.backbone
    dim = backbone.embed_dim
    chunks = grid.window_frames // backbone.chunk_frames
    steps = backbone.chunk_frames // backbone.tubelet_frames
    tokens = steps * (grid.crop_pixels // backbone.patch_pixels) ** 2
    linear = 4 * dim * dim + 2 * dim * int(dim * backbone.mlp_ratio)
    if lora_rank is not None:
        linear += _lora_weights(dim, lora_rank)
    block = chunks * tokens * (linear + 2 * tokens * dim)
    return Macs(
        patch_embedding=chunks * tokens * _patch_values(config) * dim,
        blocks=dict.fromkeys(kept_blocks, block),
        head=_head_macs(config, num_classes),
    )


def measured_macs(detector: DetectorLike) -> Macs:
    """MACs of one window, counted in a forward on the meta device: shapes only, no arithmetic.

    Weights stay where they are. LoRA that is not merged is counted.
    """
    config, grid = detector.config.backbone, detector.config.grid
    pixels = grid.crop_pixels
    frames = torch.empty((1, 3, grid.window_frames, pixels, pixels), dtype=torch.uint8, device="meta")
    mask = torch.empty((1, grid.feature_steps), dtype=torch.bool, device="meta")
    features = torch.empty((1, config.embed_dim, grid.feature_steps), device="meta")
    tokens = torch.empty(
        (
            grid.window_frames // config.chunk_frames,
            config.chunk_frames // config.tubelet_frames * (pixels // config.patch_pixels) ** 2,
            config.embed_dim,
        ),
        device="meta",
    )
    block = {index: detector.backbone.get_submodule(f"blocks.{index}") for index in detector.kept_blocks}
    blocks = {index: _counted(module, tokens) for index, module in block.items()}
    return Macs(
        patch_embedding=_counted(detector.backbone, frames) - sum(blocks.values()),
        blocks=blocks,
        head=_counted(detector.head, features, mask),
    )


def measure_latency(
    model: Callable[[Tensor, Tensor], object],
    frames: Tensor | None = None,
    mask: Tensor | None = None,
    warmup: int = 2,
    repeats: int = 10,
    device: str | torch.device = "cpu",
) -> Latency:
    """Time `model(frames, mask)` in inference mode; a module is timed in eval mode and put back.

    Args:
        model: a `Detector`, or, where frames and mask are given, any function of the same arguments.
        frames: (B, 3, T, H, W); mask: (B, feature_steps) bool, on the device to measure. Both None:
            one full grey window of the detector's grid on `device`, where the detector must lie.
        warmup: calls before the first that counts.

    Raises:
        ValueError: fewer than 1 repeats, or 0 > warmup.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"latency repeats is {repeats} and warmup {warmup}, expected at least 1 and 0")
    if frames is None or mask is None:
        assert frames is None and mask is None, "give both frames and mask, or neither"
        config = getattr(model, "config", None)
        assert isinstance(config, DetectorConfig), "only a detector knows its own window"
        grid = config.grid
        shape = (1, 3, grid.window_frames, grid.crop_pixels, grid.crop_pixels)
        frames = torch.full(shape, 128, dtype=torch.uint8, device=device)
        mask = torch.ones((1, grid.feature_steps), dtype=torch.bool, device=device)
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    seconds = []
    try:
        with torch.inference_mode():
            for call in range(warmup + repeats):
                began = time.perf_counter()
                model(frames, mask)
                if frames.is_cuda:
                    torch.cuda.synchronize(frames.device)
                if call >= warmup:
                    seconds.append(time.perf_counter() - began)
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)
    p50, p95 = np.percentile(np.array(seconds) * 1e3, (50, 95))
    return Latency(float(p50), float(p95), repeats, torch.get_num_threads())


def _head_macs(config: DetectorConfig, num_classes: int) -> int:
    """ActionFormer: embedding, stem, branch, then class and boundary towers at every level."""
    head, steps = config.head, config.grid.feature_steps
    channels = head.channels
    macs = 0
    inputs = config.backbone.embed_dim
    for _ in range(head.embedding_layers):
        macs += steps * 3 * inputs * channels
        inputs = channels
    lengths = [steps] * head.stem_layers + [steps >> level for level in range(1, head.levels)]
    for length in lengths:
        depthwise = 3 * 3 * channels  # query, key, value; at the output's length
        pointwise = 4 * channels * channels + 2 * channels * 4 * channels
        macs += length * (depthwise + pointwise + 2 * length * channels)
    tower = 2 * head.head_layers * 3 * channels * channels + 3 * channels * (num_classes + 2)
    return macs + tower * sum(steps >> level for level in range(head.levels))


def _counted(module: nn.Module, *inputs: Tensor) -> int:
    state = {name: value.to("meta") for name, value in (*module.named_parameters(), *module.named_buffers())}
    # The math kernel, because fused attention kernels hide their products from the counter.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        functional_call(module, state, inputs)
    flops = int(counter.get_total_flops())
    assert flops % 2 == 0
    return flops // 2


def _part(name: str) -> str:
    if name.startswith("head."):
        return "head"
    if ".lora_" in name:
        return "lora"
    if ".fc_norm." in name:
        return "unused_norm"
    if name.startswith("backbone.norm."):
        return "final_norm"
    if ".patch_embed." in name:
        return "patch_embedding"
    assert ".blocks." in name, f"parameter {name} belongs to no part of the cost report"
    return "block_norms" if ".norm1." in name or ".norm2." in name else "blocks"


def _lora_rank(detector: DetectorLike) -> int | None:
    for name, parameter in detector.named_parameters():
        if ".lora_A." in name:
            return int(parameter.shape[0])
    return None


def _lora_weights(dim: int, rank: int) -> int:
    """A and B on qkv (one pair) and on the projection."""
    return rank * (dim + 3 * dim) + rank * (dim + dim)


def _patch_values(config: DetectorConfig) -> int:
    return 3 * config.backbone.tubelet_frames * config.backbone.patch_pixels**2
