"""Cost: reference counts at every depth, the formula against the measured forward, latency."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pbd_ray.compression.lora import merge_lora, prepare_student
from pbd_ray.config import AlignmentConfig, BackboneConfig, DetectorConfig, GridConfig, HeadConfig
from pbd_ray.detector.detector import Detector
from pbd_ray.metrics.cost import (
    cost_report,
    count_parameters,
    measure_latency,
    measured_macs,
    trainable_parameters,
    window_macs,
)

SMALL_RANGES = ((0, 4), (4, 8), (8, 10000))
SMALL = DetectorConfig(
    grid=GridConfig(window_frames=16, feature_steps=16, crop_pixels=32),
    backbone=BackboneConfig(
        embed_dim=24, depth=4, num_heads=3, patch_pixels=8, chunk_frames=8, position_table_pixels=32
    ),
    head=HeadConfig(channels=16, num_heads=2, levels=3, regression_ranges=SMALL_RANGES),
)
RESIZED = DetectorConfig(
    grid=GridConfig(kind="resize", window_frames=32, feature_steps=8, crop_pixels=48),
    backbone=BackboneConfig(
        embed_dim=32, depth=3, num_heads=2, mlp_ratio=2.0, position_table_pixels=64, activation="relu",
        final_norm=True, unused_norm=True,
    ),
    head=HeadConfig(
        channels=12, num_heads=4, levels=3, regression_ranges=SMALL_RANGES, position_table=True,
        embedding_layers=1, stem_layers=1, head_layers=3, attention_window_steps=5, drop_path=0.0,
    ),
)  # fmt: skip


def released(size: str) -> DetectorConfig:
    dim, depth, heads = {"S": (384, 12, 6), "L": (1024, 24, 16)}[size]
    return DetectorConfig(
        backbone=BackboneConfig(embed_dim=dim, depth=depth, num_heads=heads, unused_norm=True)
    )


@pytest.mark.golden
@pytest.mark.parametrize("size", ["S", "L"])
def test_reference_counts_at_every_depth(reference_file: Callable[[str], Path], size: str) -> None:
    every = json.loads(reference_file("counts.json").read_text())
    counts = {name: expected for name, expected in every.items() if name.startswith(size)}
    config = released(size)
    depth = config.backbone.depth
    for name, expected in counts.items():
        kept = range(int(name.removeprefix(f"{size}_drop")), depth)
        macs = window_macs(config, kept, 20)
        assert macs.backbone // 48 == expected["macs_chunk_formula_merged"]
        assert macs.backbone == expected["backbone_macs_window_merged"]
        assert macs.head == expected["head_macs_window"]
        assert macs.total == expected["total_macs_window_merged"]
        unmerged = window_macs(config, kept, 20, lora_rank=config.backbone.embed_dim // 4)
        assert unmerged.backbone == expected["backbone_macs_window_lora_unmerged"]
        assert unmerged.backbone // 48 == expected["macs_chunk_flopcounter_with_lora"]

        lora = trainable_parameters(config, kept, "lora")
        assert lora.total == expected["trainable_total"]
        assert lora.total - lora.unused_norm == expected["trainable_excl_fc_norm"]
        assert (lora.lora, lora.block_norms, lora.patch_embedding, lora.unused_norm) == tuple(
            expected[key] for key in ("lora", "block_norms", "patch_embed", "fc_norm_unused")
        )
        full = trainable_parameters(config, kept, "full")
        assert full.total == expected["full_backbone"]
        assert trainable_parameters(config, kept, "lora_only").total == expected["lora"]
        assert trainable_parameters(config, kept, "none").total == 0

        if name in (min(counts), max(counts)):  # tracing a forward takes seconds
            with torch.device("meta"):
                detector = Detector(config, 20, kept)
            parameters = count_parameters(detector)
            assert parameters.head == expected["head_total"]
            assert parameters.total - parameters.head == expected["full_backbone"]
            assert parameters.unused_norm == expected["fc_norm_unused"]
            assert measured_macs(detector) == macs


def test_table_f_units() -> None:
    """Supplement, Table F: units of 2^20, truncated to two decimals."""
    expected = {"lora": ["3.11", "2.90", "2.68", "2.47"], "full": ["20.86", "19.17", "17.48", "15.79"]}
    for mode, column in expected.items():
        totals = [trainable_parameters(released("S"), range(n, 12), mode).total for n in range(4)]  # type: ignore[arg-type]
        assert [f"{int(total * 100 / 2**20) / 100:.2f}" for total in totals] == column


def test_dropping_three_of_twelve_leaves_the_stated_share() -> None:
    whole, cut = (window_macs(released("S"), range(n, 12), 20).total for n in (0, 3))
    assert round(100 * cut / whole, 1) == 75.8


@pytest.mark.parametrize("config", [SMALL, RESIZED], ids=["sliding", "resize"])
@pytest.mark.parametrize("num_classes", [1, 7])
@pytest.mark.parametrize("kept", [(0, 1, 2), (0, 2)])
def test_formula_equals_measured_forward(config: DetectorConfig, num_classes: int, kept: Any) -> None:
    detector = Detector(config, num_classes, kept)
    assert measured_macs(detector) == window_macs(config, kept, num_classes)
    assert next(detector.parameters()).device.type == "cpu"  # the detector itself is left alone


@pytest.mark.parametrize("rank", [None, 5])
def test_unmerged_lora_is_counted(rank: int | None) -> None:
    detector = Detector(SMALL, 3, (0, 3))
    before = cost_report(detector)
    prepare_student(detector, AlignmentConfig(rank=rank), torch.Generator().manual_seed(0))
    with_lora = cost_report(detector)
    assert with_lora.macs == measured_macs(detector)
    assert with_lora.macs.total > before.macs.total
    assert with_lora.parameters.lora == trainable_parameters(SMALL, (0, 3), "lora_only", rank).total
    merge_lora(detector)
    assert cost_report(detector).macs == before.macs
    assert count_parameters(detector).total == before.parameters.total


@pytest.mark.parametrize("mode", ["lora", "full", "lora_only", "none"])
@pytest.mark.parametrize("config", [SMALL, RESIZED], ids=["sliding", "resize"])
def test_trainable_formula_equals_what_alignment_trains(config: DetectorConfig, mode: Any) -> None:
    detector = Detector(config, 3, (0, 2))
    prepare_student(detector, AlignmentConfig(trainable=mode), torch.Generator().manual_seed(0))
    backbone = sum(p.numel() for p in detector.backbone.parameters() if p.requires_grad)
    formula = trainable_parameters(config, (0, 2), mode)
    assert backbone == formula.total - formula.unused_norm
    parts = count_parameters(detector)
    assert parts.trainable == backbone + (parts.head if mode in ("lora", "full") else 0)


def test_parts_add_up() -> None:
    detector = Detector(RESIZED, 3)
    parts = count_parameters(detector)
    assert parts.total == sum(p.numel() for p in detector.parameters())
    assert parts.unused_norm == parts.final_norm == 2 * 32
    assert parts.block_norms == 3 * 4 * 32


def test_latency_times_only_what_counts_and_restores_the_mode() -> None:
    detector = Detector(SMALL, 3, (0,)).train()
    frames = torch.zeros(1, 3, 16, 32, 32, dtype=torch.uint8)
    mask = torch.ones(1, 16, dtype=torch.bool)
    latency = measure_latency(detector, frames, mask, warmup=1, repeats=3)
    assert detector.training
    assert 0 < latency.p50_ms <= latency.p95_ms
    assert (latency.repeats, latency.threads) == (3, torch.get_num_threads())

    calls = []
    measure_latency(lambda f, m: calls.append(torch.is_inference_mode_enabled()), frames, mask, 2, 4)
    assert calls == [True] * 6
    shapes = []
    detector.register_forward_pre_hook(lambda _, inputs: shapes.append([tuple(x.shape) for x in inputs]))
    assert measure_latency(detector, device="cpu", warmup=0, repeats=2).p50_ms > 0
    assert shapes == [[(1, 3, 16, 32, 32), (1, 16)]] * 2
    with pytest.raises(ValueError, match="repeats is 0"):
        measure_latency(detector, frames, mask, repeats=0)
