"""The table of rounds and the frontier, from a summary as the run writes it."""

from __future__ import annotations

from typing import Any

import pytest

from pbd_ray.report.rounds import depths_info, frontier, frontier_table, rounds_text

TEACHER: dict[str, Any] = {
    "kept_blocks": [0, 1, 2, 3],
    "map": {"0.3": 0.8, "0.5": 0.6},
    "average_map": 0.7,
    "headline_map": 0.6,
    "macs": 4_000_000_000,
    "block_macs": 2_000_000_000,
    "params": 1_000_000,
    "latency_ms": 20.0,
}
ROUND: dict[str, Any] = {
    **TEACHER,
    "round": 1,
    "standing": True,
    "undecided": False,
    "dropped_block": 2,
    "kept_blocks": [0, 1, 3],
    "lr": 1e-4,
    "map": {"0.3": 0.79, "0.5": 0.58},
    "headline_map": 0.58,
    "average_map": 0.69,
    "macs": 3_000_000_000,
    "block_macs": 1_000_000_000,
    "params": 800_000,
    "latency_ms": 15.0,
    "interval": {"difference": -0.02, "low": -0.05, "high": 0.01},
}
SUMMARY = {"teacher": TEACHER, "rounds": [ROUND]}
ATTEMPTS = {
    "teacher": TEACHER,
    "rounds": [
        {**ROUND, "standing": False, "dropped_block": 0, "headline_map": 0.1},
        {**ROUND, "round": 2, "undecided": True},
        {**ROUND, "round": 3},
    ],
}
"""Block 0 went and came back; then two rounds that stand."""


def test_ratios_are_of_the_teacher() -> None:
    teacher, first = depths_info(SUMMARY)
    assert (teacher.macs_ratio, teacher.params_ratio, teacher.latency_ratio) == (1.0, 1.0, 1.0)
    assert (first.macs_ratio, first.params_ratio, first.latency_ratio) == (0.75, 0.8, 0.75)
    assert (teacher.block_macs_ratio, first.block_macs_ratio) == (1.0, 0.5)
    assert (first.difference, first.low, first.high) == (-0.02, -0.05, 0.01)
    assert (teacher.blocks, first.blocks, first.dropped_block) == (4, 3, 2)
    assert teacher.difference is None


@pytest.mark.parametrize(
    "shown",
    [
        "teacher",
        "0.0001",
        "@0.3",
        "0.7900",
        "0.5800",
        "-0.0200 [-0.0500, +0.0100]",
        "50.0%",
        "3 (75.0%)",
        "15 (75.0%)",
    ],
)
def test_table_shows(shown: str) -> None:
    assert shown in rounds_text(depths_info(SUMMARY), "mAP@0.5")


def test_table_is_whole_in_a_log() -> None:
    """Nothing is cut short where there is no terminal to measure."""
    assert "…" not in rounds_text(depths_info(SUMMARY), "average mAP")


def test_frontier() -> None:
    table = frontier_table(depths_info(SUMMARY))
    assert table.column("blocks").to_pylist() == [4, 3]
    assert table.column("dropped_block").to_pylist() == [None, 2]
    assert table.column("headline_map").to_pylist() == [0.6, 0.58]
    assert table.column("macs").to_pylist() == [4_000_000_000, 3_000_000_000]


def test_what_was_rolled_back_is_shown_and_is_no_depth() -> None:
    depths = depths_info(ATTEMPTS)
    assert [depth.label for depth in depths] == ["teacher", "1", "2", "3"]
    assert [depth.label for depth in frontier(depths)] == ["teacher", "2", "3"]
    assert frontier_table(depths).column("dropped_block").to_pylist() == [None, 2, 2]
    flags = [line.split("%)")[-1].strip() for line in rounds_text(depths, "mAP@0.5").splitlines()[-4:]]
    assert flags == ["", "rolled back", "undecided", ""]
