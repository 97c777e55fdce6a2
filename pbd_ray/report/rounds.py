"""A finished or running compression as numbers (pure) and as a table for a terminal or a job log."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 220


@dataclass(frozen=True)
class DepthInfo:
    """The model of one committed round beside the teacher; ratios are of the teacher's value."""

    label: str
    standing: bool
    """False: the round was rolled back, and no later model comes from it."""
    undecided: bool
    """It stands, but the selection videos could not tell whether all holds that the recipe asks of it."""
    dropped_block: int | None
    blocks: int
    learning_rate: float | None
    map: Mapping[str, float]
    """By tIoU, as in summary.json."""
    average_map: float
    headline_map: float
    difference: float | None
    """Headline mAP minus the teacher's, with its interval."""
    low: float | None
    high: float | None
    macs: int
    macs_ratio: float
    block_macs_ratio: float
    """Of the transformer blocks alone."""
    params: int
    params_ratio: float
    latency_ms: float
    latency_ratio: float


def depths_info(summary: Mapping[str, Any]) -> tuple[DepthInfo, ...]:
    """The teacher and every committed round of a `summary.json`, in order."""
    teacher = summary["teacher"]
    return tuple(_depth(entry, teacher) for entry in (teacher, *summary["rounds"]))


def headline_name(tiou: float | str) -> str:
    """What headline mAP means, such as 'mAP@0.5'."""
    return "average mAP" if tiou == "average" else f"mAP@{tiou:g}"


def frontier(depths: Sequence[DepthInfo]) -> tuple[DepthInfo, ...]:
    """The depths that a run offers: without rounds that were rolled back."""
    return tuple(depth for depth in depths if depth.standing)


def frontier_table(depths: Sequence[DepthInfo]) -> pa.Table:
    """`frontier.parquet`: what each depth that stands costs and reaches."""
    depths = frontier(depths)
    return pa.table(
        {
            "blocks": pa.array([depth.blocks for depth in depths], pa.int32()),
            "dropped_block": pa.array([depth.dropped_block for depth in depths], pa.int32()),
            "headline_map": [depth.headline_map for depth in depths],
            "average_map": [depth.average_map for depth in depths],
            "macs": pa.array([depth.macs for depth in depths], pa.int64()),
            "params": pa.array([depth.params for depth in depths], pa.int64()),
            "latency_ms": [depth.latency_ms for depth in depths],
        }
    )


def rounds_text(depths: Sequence[DepthInfo], headline: str) -> str:
    """The table of rounds as plain text.

    Args:
        headline: what headline mAP means, such as 'mAP@0.5'.
    """
    table = Table(box=box.SIMPLE, pad_edge=False)
    tious = list(depths[0].map)
    columns = ["round", "dropped", "blocks", "lr", *(f"@{tiou}" for tiou in tious), "average"]
    columns += [f"{headline} - teacher (interval)", "block MACs", "G MACs", "M params", "ms/window", ""]
    for column in columns:
        table.add_column(column, justify="left" if column == "round" else "right", no_wrap=True)
    for depth in depths:
        table.add_row(
            depth.label,
            _or_dash(depth.dropped_block),
            str(depth.blocks),
            "-" if depth.learning_rate is None else f"{depth.learning_rate:.2g}",
            *(f"{depth.map[tiou]:.4f}" for tiou in tious),
            f"{depth.average_map:.4f}",
            _interval(depth),
            f"{depth.block_macs_ratio:.1%}",
            f"{depth.macs / 1e9:.4g} ({depth.macs_ratio:.1%})",
            f"{depth.params / 1e6:.4g} ({depth.params_ratio:.1%})",
            f"{depth.latency_ms:.4g} ({depth.latency_ratio:.1%})",
            "undecided" if depth.undecided else "" if depth.standing else "rolled back",
        )
    stream = io.StringIO()
    Console(file=stream, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().strip("\n").splitlines())


def _depth(entry: Mapping[str, Any], teacher: Mapping[str, Any]) -> DepthInfo:
    interval = entry.get("interval") or {}
    return DepthInfo(
        label="teacher" if entry is teacher else str(entry["round"]),
        standing=entry is teacher or entry["standing"],
        undecided=entry is not teacher and entry["undecided"],
        dropped_block=entry.get("dropped_block"),
        blocks=len(entry["kept_blocks"]),
        learning_rate=entry.get("lr"),
        map=entry["map"],
        average_map=entry["average_map"],
        headline_map=entry["headline_map"],
        difference=interval.get("difference"),
        low=interval.get("low"),
        high=interval.get("high"),
        macs=entry["macs"],
        macs_ratio=entry["macs"] / teacher["macs"],
        block_macs_ratio=entry["block_macs"] / teacher["block_macs"],
        params=entry["params"],
        params_ratio=entry["params"] / teacher["params"],
        latency_ms=entry["latency_ms"],
        latency_ratio=entry["latency_ms"] / teacher["latency_ms"],
    )


def _interval(depth: DepthInfo) -> str:
    if depth.difference is None:
        return "-"
    return f"{depth.difference:+.4f} [{depth.low:+.4f}, {depth.high:+.4f}]"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
