"""The scoring benchmark: its sums, that it notices rows that differ, and one part from end to end."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import scoring, scoring_rounds
from benchmarks.scoring import Target
from benchmarks.scoring_cases import Case, tiny
from benchmarks.scoring_machine import block_products
from benchmarks.scoring_rounds import Round, decoding_once, naive_and_fused
from pbd_ray.config import BackboneConfig, DetectorConfig, GridConfig, HeadConfig, RacingConfig
from pbd_ray.detector.detector import Detector
from pbd_ray.metrics.cost import measured_macs


@pytest.mark.parametrize("windows", [1, 3])
def test_block_products_are_a_blocks_macs(windows: int) -> None:
    """Counted by tracing a block's forward."""
    config = DetectorConfig(
        grid=GridConfig(window_frames=64, feature_steps=64, crop_pixels=64),
        backbone=BackboneConfig(embed_dim=48, depth=2, num_heads=3, mlp_ratio=2.0),
        head=HeadConfig(channels=32),
    )
    macs = 0
    for left, right in block_products(config, windows):
        batch, inner = left[:-2], left[-1]
        assert right[:-2] == batch and right[-2] == inner
        macs += (batch[0] if batch else 1) * left[-2] * inner * right[-1]
    assert macs == windows * measured_macs(Detector(config, 4)).blocks[0]


def test_decoding_once_takes_the_other_decodes_off() -> None:
    naive = Round("naive loop", 30.0, {"decode": 12.0, "blocks": 17.0, "rest": 1.0}, 25, 3, {})
    once = decoding_once(naive, arms=6)
    assert once.stage_seconds == {"decode": 2.0, "blocks": 17.0, "rest": 1.0}
    assert once.cpu_seconds == sum(once.stage_seconds.values()) == 20.0
    assert once.block_forwards == 25


@pytest.mark.parametrize(
    ("value", "at_most", "met"),
    [(1.0, True, True), (1.01, True, False), (1.0, False, True), (0.99, False, False)],
)
def test_target(value: float, at_most: bool, met: bool) -> None:
    target = Target("what", value, 1.0, at_most)
    assert target.met == met
    assert ("MISSED" in str(target)) == (not met)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Of six videos, which race to a barrier after five; the naive loop runs on two."""
    whole = tiny(tmp_path_factory.mktemp("videos"), videos=6)
    experiment = whole.recipe.experiment
    scoring = experiment.scoring.model_copy(update={"racing": RacingConfig(min_videos=5)})
    raced = experiment.model_copy(update={"scoring": scoring})
    return replace(whole, recipe=whole.recipe.model_copy(update={"experiment": raced}), naive_videos=2)


def swapped(table: pa.Table) -> pa.Table:
    return table.take([1, 0, *range(2, table.num_rows)])


@pytest.mark.slow
@pytest.mark.parametrize("change", [swapped, lambda table: table.slice(1)], ids=["order", "a row less"])
def test_other_rows_are_noticed(
    case: Case, monkeypatch: pytest.MonkeyPatch, change: Callable[[pa.Table], pa.Table]
) -> None:
    honest = scoring_rounds.score_videos
    monkeypatch.setattr(scoring_rounds, "score_videos", lambda *args: change(honest(*args)))
    with pytest.raises(RuntimeError, match="differ between the naive loop and the fused"):
        naive_and_fused(case)


@pytest.fixture
def run_benchmark(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """run_benchmark("--part", ...) -> exit status; the tiny part is that of `case`."""
    logger = logging.getLogger("pbd_ray.metrics.mean_ap")
    level = logger.level

    def run(*arguments: str) -> int:
        monkeypatch.setattr(scoring, "tiny", lambda root: case)
        monkeypatch.setattr(sys, "argv", ["scoring.py", *arguments])
        return scoring.main()

    yield run
    logger.setLevel(level)


@pytest.mark.slow
def test_tiny_part(
    run_benchmark: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts are exact. What the clock says decides the exit status and nothing here."""
    output = tmp_path / "out.json"
    status = run_benchmark("--part", "tiny", "--json", str(output))
    document = json.loads(output.read_text())
    missed = [target for target in document["targets"] if not target["met"]]
    assert status == bool(missed)
    assert len(document["targets"]) == 1
    rounds = {row["what"]: row for row in document["parts"]["tiny"]["rounds"]}
    windows, blocks = 18, 5
    naive, fused = (rounds[name]["block_forwards"] for name in ("naive loop", "fused"))
    assert naive == windows * (blocks + blocks * (blocks - 1))
    assert fused == windows * (blocks + blocks * (blocks - 1) // 2)
    assert rounds["fused, a whole round"]["block_forwards"] == fused
    assert rounds["fused + racing"]["block_forwards"] <= fused
    printed = capsys.readouterr().out
    for row in rounds.values():
        assert sum(row["stage_seconds"].values()) == pytest.approx(row["cpu_seconds"])
        assert row["what"] in printed
