"""The figures of pages, each one axes: thin drawing, the numbers come from `*_info` functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pbd_ray.metrics.detad import OUTCOMES, Detad
from pbd_ray.report.ablation import AblationRow
from pbd_ray.report.detection_figures import profile_info
from pbd_ray.report.explain import CandidateInfo
from pbd_ray.report.findings import ClassInfo, RateCurve
from pbd_ray.report.rounds import DepthInfo
from pbd_ray.report.svg import ACCENT, INK, MUTED, SECOND, SERIES
from pbd_ray.report.svg import OUTCOMES as OUTCOME_COLORS


def draw_candidates(
    axes: Any, candidates: Sequence[CandidateInfo], undropped: float | None, name: str, higher_is_better: bool
) -> None:
    """Score of every candidate, best on top; the bar is the interval of its distance from the chosen one.

    Hollow: stopped by racing, on fewer videos. Dashed: the student with nothing removed.
    """
    chosen = candidates[0]
    for row, candidate in enumerate(candidates):
        if candidate.score is None:
            continue
        color = ACCENT if candidate is chosen else SECOND if "rolled back" in candidate.fate else MUTED
        behind, low, high = candidate.behind, candidate.low, candidate.high
        if behind is not None and low is not None and high is not None:
            # Scores of raced candidates are of fewer videos: the distance is put on the candidate's own.
            sign = -1 if higher_is_better else 1
            ends = [candidate.score + sign * (bound - behind) for bound in (low, high)]
            axes.plot(ends, (row, row), color=color, linewidth=2, solid_capstyle="butt")
        face = "none" if candidate.stopped else color
        axes.plot(candidate.score, row, "o", markersize=6, markerfacecolor=face, color=color)
    if undropped is not None:
        axes.axvline(undropped, color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(candidates)), [f"block {candidate.block}" for candidate in candidates])
    axes.set_ylim(len(candidates) - 0.5, -0.5)
    axes.set_xlabel(name)
    axes.grid(axis="y", visible=False)


def draw_curves(
    axes: Any, curves: Sequence[RateCurve], chosen: tuple[float, int], field: str, name: str
) -> None:
    """One line a learning rate over its epochs; a ring around the chosen epoch of the chosen one.

    Args:
        field: of RateCurve, what is drawn.
    """
    for index, curve in enumerate(curves):
        values = getattr(curve, field)
        color = SERIES[index % len(SERIES)]
        axes.plot(curve.epochs, values, "o-", markersize=3, color=color, label=curve.label)
        if curve.learning_rate == chosen[0] and chosen[1] in curve.epochs:
            place = curve.epochs.index(chosen[1])
            axes.plot(chosen[1], values[place], "o", markersize=11, markerfacecolor="none", color=ACCENT)
    axes.set_xlabel("epoch")
    axes.set_ylabel(name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(title="learning rate", title_fontsize="small")


def draw_cost(axes: Any, depths: Sequence[DepthInfo], field: str, name: str, headline: str) -> None:
    """Headline mAP against a cost, one point a depth; the bar is the interval of the difference to the
    teacher, put on the point.

    Args:
        field: of DepthInfo, a share of the teacher's cost.
    """
    x = [getattr(depth, field) * 100 for depth in depths]
    y = [depth.headline_map for depth in depths]
    below = [max(0.0, (depth.difference or 0) - (depth.low or 0)) for depth in depths]
    above = [max(0.0, (depth.high or 0) - (depth.difference or 0)) for depth in depths]
    axes.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, color=ACCENT)
    axes.axhline(depths[0].headline_map, linestyle="--", color=MUTED, linewidth=1)
    for depth, place in zip(depths, x, strict=True):
        label = f"{depth.blocks} blocks"
        axes.annotate(
            label, (place, depth.headline_map), xytext=(5, 6), textcoords="offset points", fontsize="small"
        )
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel(f"{name} (% of the teacher's)")
    axes.set_ylabel(headline)


def draw_classes(axes: Any, classes: Sequence[ClassInfo]) -> None:
    """Difference of every class's AP to the teacher's, with its interval; the largest loss on top."""
    for row, one in enumerate(classes):
        axes.plot((one.low, one.high), (row, row), color=MUTED, linewidth=2, solid_capstyle="butt")
        axes.plot(one.difference, row, "o", markersize=5, color=ACCENT)
    axes.axvline(0, color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(classes)), [_short(one.name) for one in classes])
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_xlabel("AP less the teacher's")
    axes.grid(axis="y", visible=False)


def draw_profile(axes: Any, detad: Detad) -> None:
    """What the best, the next, ... detections are (DETAD's false-positive profile; paper, figure A)."""
    groups = profile_info(detad)
    below = np.zeros(len(groups))
    for outcome, color in zip(OUTCOMES, OUTCOME_COLORS, strict=True):
        height = np.array([shares[outcome] * 100 for _, shares in groups])
        axes.bar([name for name, _ in groups], height, bottom=below, color=color, label=outcome, width=0.75)
        below += height
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    axes.set_ylim(0, 100)
    axes.set_ylabel("share (%)")
    axes.set_xlabel("detections by score; G instances a class")


def draw_pairs(axes: Any, pairs: Mapping[str, tuple[float, float]], name: str) -> None:
    """Two bars a group, the teacher's and the student's value."""
    places = np.arange(len(pairs))
    for index, (who, color) in enumerate((("teacher", SECOND), ("student", ACCENT))):
        heights = [pair[index] for pair in pairs.values()]
        axes.bar(places + (index - 0.5) * 0.38, heights, width=0.36, color=color, label=who)
    axes.set_xticks(places, list(pairs), fontsize="small")
    axes.set_ylabel(name)
    axes.grid(axis="x", visible=False)
    values = [value for pair in pairs.values() for value in pair]
    bottom, top = min(values, default=0.0), max(values, default=0.0)
    if bottom == top == 0:
        axes.text(0.5, 0.5, "0 everywhere", transform=axes.transAxes, ha="center", va="center")
        axes.set_ylim(0, 1)
        return
    axes.set_ylim(min(0.0, 1.1 * bottom), 1.2 * max(0.0, top))
    axes.legend(loc="best")


def draw_rows(axes: Any, rows: Sequence[AblationRow], name: str) -> None:
    """mAP of every row of an ablation's table, in its order, and the deviation of its runs."""
    for place, row in enumerate(rows):
        if row.map is None:
            continue
        spread = row.deviation or 0.0
        ends = (row.map - spread, row.map + spread)
        axes.plot(ends, (place, place), color=MUTED, linewidth=2, solid_capstyle="butt")
        axes.plot(row.map, place, "o", markersize=6, color=ACCENT)
    axes.set_yticks(range(len(rows)), [_short(row.row, 34) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(name)
    axes.grid(axis="y", visible=False)


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
