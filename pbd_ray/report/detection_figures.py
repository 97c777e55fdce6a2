"""The pictures of a detector's evaluation; what they show comes from pure `*_info` functions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from pbd_ray.metrics.detad import ERRORS, OUTCOMES, Buckets, Detad
from pbd_ray.metrics.mean_ap import Matches

Floats = npt.NDArray[np.float64]

RECALLS = np.linspace(0, 1, 101)
COLORS = dict(zip(OUTCOMES, ("#33a02c", "#b2df8a", "#1f78b4", "#fb9a99", "#e31a1c", "#a6cee3"), strict=True))


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """One tIoU's curve, the mean over classes with ground truth of interpolated precision; (R,) each."""

    tiou: float
    recall: Floats
    precision: Floats


@dataclass(frozen=True)
class Bar:
    """One bucket of one characteristic; `value` is what the figure is about."""

    characteristic: str
    bucket: str
    value: float
    share: float
    """Of all instances."""


def precision_recall_info(matches: Matches, recalls: Floats = RECALLS) -> tuple[PrecisionRecall, ...]:
    """For each tIoU the highest precision at a recall of at least r, 0 past the last true positive."""
    positives = matches.ground_truth.counts.sum(axis=1)
    present = np.flatnonzero(positives)
    curves = []
    for tiou, flags in zip(matches.tious, matches.true_positive, strict=True):
        total = np.zeros(len(recalls))
        for label in present:
            span = slice(matches.class_offsets[label], matches.class_offsets[label + 1])
            rank = np.flatnonzero(flags[span])
            found = np.arange(1, len(rank) + 1)
            envelope = np.maximum.accumulate((found / (rank + 1))[::-1])[::-1]
            place = np.searchsorted(found / positives[label], recalls)
            total += np.append(envelope, 0)[place]
        curves.append(PrecisionRecall(tiou, recalls, total / len(present)))
    return tuple(curves)


def profile_info(detad: Detad) -> tuple[tuple[str, dict[str, float]], ...]:
    """(`1G`, shares of every outcome), ...: the groups that hold a detection."""
    groups = ((f"{index}G", shares) for index, shares in enumerate(detad.profile, 1))
    return tuple((name, dict(shares)) for name, shares in groups if shares is not None)


def bars_info(values: Buckets, shares: Buckets) -> tuple[Bar, ...]:
    """Buckets with instances, characteristic by characteristic, in the order of the rules."""
    return tuple(
        Bar(name, bucket, value, shares[name][bucket])
        for name, buckets in values.items()
        for bucket, value in buckets.items()
    )


def spread_info(detad: Detad) -> tuple[tuple[str, float, float], ...]:
    """(characteristic, lowest, highest bucket's mAP_N), as ratios to mAP_N of all instances.

    Empty where that is 0.
    """
    if not detad.base_map_n:
        return ()
    return tuple(
        (name, min(buckets.values()) / detad.base_map_n, max(buckets.values()) / detad.base_map_n)
        for name, buckets in detad.sensitivity.items()
        if buckets
    )


def draw_precision_recall(curves: Sequence[PrecisionRecall]) -> bytes:
    """One line a tIoU; PNG. The area under a line is about the mAP at its tIoU."""
    figure = Figure(figsize=(6, 4.5))
    axes = figure.subplots(gridspec_kw={"left": 0.1, "right": 0.97, "bottom": 0.11, "top": 0.97})
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    for curve, color in zip(curves, shades, strict=True):
        axes.plot(curve.recall, curve.precision, color=color, label=f"tIoU {curve.tiou:g}")
    axes.set(xlabel="recall", ylabel="precision, mean over classes", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def draw_false_positives(detad: Detad) -> bytes:
    """Left what the best, the next, ... detections are; right what removing each error type gains; PNG."""
    figure = Figure(figsize=(11, 4.8))
    margins = {"left": 0.06, "right": 0.99, "bottom": 0.27, "top": 0.93, "wspace": 0.15}
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), gridspec_kw=margins)
    groups = profile_info(detad)
    names = [name for name, _ in groups]
    below = np.zeros(len(groups))
    for outcome in OUTCOMES:
        height = np.array([shares[outcome] * 100 for _, shares in groups])
        left.bar(names, height, bottom=below, color=COLORS[outcome], label=outcome)
        below += height
    left.set(
        xlabel="detections by score, G = instances of the class", ylabel="share (%)", title="What they are"
    )
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=len(OUTCOMES) // 2)
    gains = [detad.gain[error] * 100 for error in ERRORS]
    drawn = right.bar(range(len(ERRORS)), gains, color=[COLORS[error] for error in ERRORS])
    right.bar_label(drawn, fmt="%.1f")
    names = [error.removesuffix(" Err").replace(" ", "\n") for error in ERRORS]
    right.set_xticks(range(len(ERRORS)), names, fontsize="small")
    right.set(ylabel="gain in average mAP_N (points)", title="What removing an error gains")
    right.margins(y=0.15)
    return _png(figure)


def draw_false_negatives(detad: Detad) -> bytes:
    """Share of instances missed, by bucket; PNG."""
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots(gridspec_kw={"left": 0.07, "right": 0.99, "bottom": 0.18, "top": 0.91})
    _draw_bars(axes, bars_info(detad.false_negative_rate, detad.bucket_share))
    axes.set(ylabel="instances missed (%)", ylim=(0, 112))
    return _png(figure)


def draw_sensitivity(detad: Detad) -> bytes:
    """Left mAP_N by bucket beside that of all instances, right its range relative to it; PNG."""
    figure = Figure(figsize=(11, 4))
    margins = {"left": 0.06, "right": 0.98, "bottom": 0.18, "top": 0.91, "wspace": 0.15}
    left, right = figure.subplots(1, 2, width_ratios=(3, 1), gridspec_kw=margins)
    bars = bars_info(detad.sensitivity, detad.bucket_share)
    _draw_bars(left, bars)
    left.axhline(detad.base_map_n * 100, linestyle="--", color="black", linewidth=1)
    left.set_ylabel(f"average mAP_N (%), of all instances {detad.base_map_n * 100:.1f}")
    left.set_ylim(0, 1.12 * 100 * max([detad.base_map_n, *(bar.value for bar in bars), 0.01]))
    for place, (_, low, high) in enumerate(spread_info(detad)):
        right.plot((place, place), (low, high), marker="_", markersize=16, linewidth=4, color=f"C{place}")
        for value in (low, high):
            right.annotate(f"{value:.2f}", (place, value), xytext=(10, 0), textcoords="offset points")
    right.set_xticks(
        range(len(spread_info(detad))), [name.replace("-", "\n") for name, *_ in spread_info(detad)]
    )
    right.axhline(1, linestyle="--", color="black", linewidth=1)
    right.set_ylabel("relative to all instances")
    right.margins(x=0.4)
    return _png(figure)


def _draw_bars(axes: Any, bars: Sequence[Bar]) -> None:
    """Bars with a gap between characteristics; under each its bucket and the bucket's share."""
    characteristics = list(dict.fromkeys(bar.characteristic for bar in bars))
    ticks: list[int] = []
    for index, name in enumerate(characteristics):
        group = [bar for bar in bars if bar.characteristic == name]
        first = len(ticks) + index
        places = list(range(first, first + len(group)))
        drawn = axes.bar(places, [bar.value * 100 for bar in group], color=f"C{index}", label=name)
        axes.bar_label(drawn, fmt="%.1f", fontsize="small")
        ticks += places
    axes.set_xticks(ticks, [f"{bar.bucket}\n{bar.share:.0%}" for bar in bars], fontsize="small")
    axes.set_xlabel("bucket, and its share of the instances")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if bars:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(characteristics), frameon=False)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()
