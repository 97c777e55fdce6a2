"""What other metrics would have chosen, as numbers and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from pbd_ray.metrics.intervals import MapInterval
from pbd_ray.report.plain import plain_text

_WIDTH = 120


@dataclass(frozen=True)
class ReplayedMetric:
    """A round's choice by one metric, among the candidates that racing did not stop."""

    metric: str
    block: int
    """That would have gone."""
    lead: MapInterval | None
    """How far it is ahead of the one that went, by this metric; None where they are the same."""
    tau: float
    """Kendall's tau-b of the scores by this metric and by the run's own; nan: one has no order."""


@dataclass(frozen=True)
class ReplayedRound:
    """What other metrics say of a round."""

    round: int
    dropped_block: int
    candidates: int
    stopped: tuple[int, ...]
    """Blocks that the run's own metric stopped on the way: no metric can choose them any more."""
    metrics: tuple[ReplayedMetric, ...]


def whatif_text(rounds: Sequence[ReplayedRound]) -> str:
    """Every round's table for a terminal; one line where no round was scored by mAP."""
    if not rounds:
        return "no committed round was scored by mAP: there are no detections to choose from again"
    return "\n\n".join(_round(one) for one in rounds)


def _round(one: ReplayedRound) -> str:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("metric", "would drop", "ahead of the one that went (interval)", "Kendall's tau"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for metric in one.metrics:
        tau = "-" if math.isnan(metric.tau) else f"{metric.tau:+.2f}"
        table.add_row(metric.metric, str(metric.block), _lead(metric.lead), tau)
    head = f"round {one.round}: block {one.dropped_block} went, of {one.candidates} candidates"
    if one.stopped:
        blocks = ", ".join(map(str, one.stopped))
        head += f"; racing had stopped blocks {blocks}, which no metric can choose any more"
    others = sorted({metric.block for metric in one.metrics} - {one.dropped_block})
    told = f"another block would have gone: {', '.join(map(str, others))}" if others else "no other block"
    return "\n".join([head, "", plain_text(table, _WIDTH), "", f"round {one.round}: {told}"])


def _lead(lead: MapInterval | None) -> str:
    return "the same" if lead is None else f"{lead.value:+.4f} [{lead.low:+.4f}, {lead.high:+.4f}]"
