"""What a card says that depends on the detector. Its code is run in tests/jobs/test_export.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pbd_ray.config import DetectorConfig, GridConfig
from pbd_ray.metrics.cost import CostReport, Macs, Parameters
from pbd_ray.report.model_card import CardFacts, model_card

FACTS = CardFacts(
    config=DetectorConfig(),
    classes=("Jump", "a|b *c* <i>"),
    depth=12,
    kept_blocks=(0, 1, 2, 3, 4, 5, 6, 8, 9, 11),
    cost=CostReport(Parameters(1234567, 0, 0, 0, 0, 0, 0, 0, 0), Macs(1000, {0: 20}, 3)),
    test_map={0.7: 0.25, 0.5: 0.71234},
    weights="abc",
)
RESIZED = GridConfig(kind="resize", window_frames=768, feature_steps=192)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "Blocks: 10 of 12, dropped: 7, 10 (numbered from 0). In this export they are numbered 0 to 9."),
        ({"kept_blocks": tuple(range(12))}, "Blocks: 12 of 12, none dropped. In this export they are"),
        ({}, "| classes, in label order | Jump, a\\|b \\*c\\* \\<i\\> |"),
        ({}, "| parameters of the whole detector | 1,234,567 |"),
        ({}, "| multiply-accumulates of a window, whole detector | 1,023 |"),
        ({}, "| test mAP, whole detector | 0.7123 at tIoU 0.5, 0.2500 at tIoU 0.7 |"),
        ({"test_map": None}, "| test mAP, whole detector | not known to this export |"),
        ({}, "One frame of the video in 4, 768 a window;"),
        ({"config": DetectorConfig(grid=RESIZED)}, "The whole video as 768 frames, at the centres of"),
    ],
)
def test_lines(change: dict[str, object], line: str) -> None:
    card = model_card("safetensors", replace(FACTS, **change))
    assert any(found.startswith(line) for found in card.splitlines())
