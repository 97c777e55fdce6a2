"""Figures: the numbers come from pure `*_info` functions, the drawing here is thin."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from pbd_ray.report.rounds import DepthInfo, frontier


def draw_frontier(depths: Sequence[DepthInfo], headline: str) -> bytes:
    """Accuracy against cost, one point a depth that stands; PNG.

    Left against MACs, right against measured latency, both as a share of the teacher's; bars are the
    interval of the difference to the teacher, put on the teacher's mAP.
    """
    depths = frontier(depths)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    teacher = depths[0].headline_map
    # The interval is of the difference to the teacher: put on the teacher's mAP it brackets the point.
    below = [max(0.0, (depth.difference or 0) - (depth.low or 0)) for depth in depths]
    above = [max(0.0, (depth.high or 0) - (depth.difference or 0)) for depth in depths]
    costs = {
        "MACs, share of the teacher's": (left, [depth.macs_ratio for depth in depths]),
        "latency, share of the teacher's": (right, [depth.latency_ratio for depth in depths]),
    }
    scores = [depth.headline_map for depth in depths]
    for name, (axes, cost) in costs.items():
        axes.errorbar(cost, scores, yerr=[below, above], marker="o", capsize=3, color="tab:blue")
        axes.axhline(teacher, linestyle=":", color="tab:gray")
        for depth, x in zip(depths, cost, strict=True):
            axes.annotate(
                f"{depth.blocks} blocks", (x, depth.headline_map), xytext=(5, 6), textcoords="offset points"
            )
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    left.set_ylabel(headline)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
