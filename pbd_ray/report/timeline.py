"""What was found in one video, as a picture: frames along the time axis, below them a lane for every class.

Everything that decides what is drawn where is `timeline_info`, in seconds and rows; the drawing is thin.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pbd_ray.config import one_line
from pbd_ray.report.names import names_as_written

BEST, BEST_SHARE = 20, 0.25
"""Where no least score is asked for, so many detections of a model are drawn, of at least that share of its
best score in the video: what a score means differs from model to model."""
MOST_LANES, MOST_ROWS = 24, 4
"""Classes, and rows of one model in a class's lane: what is beyond is not drawn."""
_DPI = 100
_AXES_INCHES, _LEFT_INCHES, _RIGHT_INCHES = 11.0, 2.0, 0.3
_STRIP_INCHES, _ROW_INCHES, _HEAD_INCHES, _FOOT_INCHES = 1.0, 0.19, 0.4, 0.6
_MOST_FRAMES = 16
_LABEL_INCHES = 0.28
"""Of a score in a bar."""
_LANE_GAP_ROWS = 0.35


@dataclass(frozen=True, eq=False)
class Strip:
    """Frames of a video at the centres of equal parts of it."""

    indices: npt.NDArray[np.int64]
    """(N,) frames of the file, ascending."""
    centers_seconds: npt.NDArray[np.float64]
    """(N,)"""
    width_seconds: float
    """Of a frame on the time axis: it keeps its proportions there."""
    height_inches: float
    short_side_pixels: int


@dataclass(frozen=True)
class Bar:
    """A detection. `row` counts within the rows of its model in its lane."""

    start_seconds: float
    end_seconds: float
    score: float
    row: int
    label_seconds: float
    """Where the score is written, from here on."""


@dataclass(frozen=True)
class Lane:
    """A class, and for every model its rows of bars that do not touch."""

    label: str
    models: tuple[tuple[Bar, ...], ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of every model, at least one."""
        return tuple(1 + max((bar.row for bar in bars), default=0) for bars in self.models)


@dataclass(frozen=True)
class TimelineInfo:
    """What is drawn of one video."""

    duration_seconds: float
    lanes: tuple[Lane, ...]
    """Best class first, by its highest score of any model."""
    drawn: int
    """Detections in the lanes."""
    found: int
    """Detections of all models."""


def strip_info(frames: int, fps: float, width_pixels: int, height_pixels: int) -> Strip:
    """As many frames as stand side by side without touching, at most 16, all of one height."""
    aspect = width_pixels / height_pixels
    height_inches = min(_STRIP_INCHES, _AXES_INCHES / aspect)
    width_inches = height_inches * aspect
    count = max(1, min(_MOST_FRAMES, frames, int(_AXES_INCHES / width_inches + 1e-9)))
    centers = (np.arange(count) + 0.5) / count
    height_on_paper = height_inches * _DPI
    return Strip(
        indices=np.minimum((centers * frames).astype(np.int64), frames - 1),
        centers_seconds=centers * frames / fps,
        width_seconds=width_inches / _AXES_INCHES * frames / fps,
        height_inches=height_inches,
        short_side_pixels=max(16, round(height_on_paper * min(1.0, aspect))),
    )


def timeline_info(
    detections: Sequence[pa.Table],
    classes: Sequence[str],
    duration_seconds: float,
    min_score: float | None = None,
) -> TimelineInfo:
    """Choose what is drawn and lay it out.

    Args:
        detections: of one video, DETECTION_SCHEMA, a table for every model.
        min_score: every detection of at least this score; None: the best of every model (`BEST`).
    """
    chosen = [_chosen(table, min_score) for table in detections]
    best: dict[int, float] = {}
    for table in chosen:
        for label, score in zip(table["label"].to_pylist(), table["score"].to_pylist(), strict=True):
            best[label] = max(best.get(label, 0.0), score)
    order = sorted(best, key=lambda label: (-best[label], label))[:MOST_LANES]
    lanes = tuple(
        Lane(classes[label], tuple(_bars(table, label, duration_seconds) for table in chosen))
        for label in order
    )
    drawn = sum(len(bars) for lane in lanes for bars in lane.models)
    return TimelineInfo(duration_seconds, lanes, drawn, sum(table.num_rows for table in detections))


def _chosen(table: pa.Table, min_score: float | None) -> pa.Table:
    """Rows by falling score."""
    table = table.sort_by([("score", "descending"), ("start", "ascending"), ("end", "ascending")])
    if min_score is None and table.num_rows:
        table, min_score = table.slice(0, BEST), BEST_SHARE * table["score"][0].as_py()
    return table.filter(pc.greater_equal(table["score"], min_score or 0.0))


def _bars(table: pa.Table, label: int, duration_seconds: float) -> tuple[Bar, ...]:
    """The bars of a class, best first, each in the first row where it and its label touch no better one."""
    rows: list[list[tuple[float, float]]] = []
    bars: list[Bar] = []
    label_width = _LABEL_INCHES / _AXES_INCHES * duration_seconds
    own = table.filter(pc.equal(table["label"], label))
    columns = (own[name].to_pylist() for name in ("start", "end", "score"))
    for start, end, score in zip(*columns, strict=True):
        start, end = (min(max(time, 0.0), duration_seconds) for time in (start, end))
        left = min(start, duration_seconds - label_width)
        right = max(end, left + label_width)
        free = (
            number
            for number, taken in enumerate(rows)
            if all(right <= begin or left >= stop for begin, stop in taken)
        )
        row = next(free, len(rows))
        if row == MOST_ROWS:
            continue
        if row == len(rows):
            rows.append([])
        rows[row].append((left, right))
        bars.append(Bar(start, end, score, row, left))
    return tuple(bars)


def clock(seconds: float, step_seconds: float = 1.0) -> str:
    """A time of a video: 0.4 s (among times less than a second apart), 1:05, 1:00:00."""
    if step_seconds < 1:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def tick_seconds(duration_seconds: float) -> npt.NDArray[np.float64]:
    """At most 13 round times from 0 on, the end not beyond the video."""
    steps: list[float] = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200]
    if duration_seconds < 4:
        power = 10.0 ** np.floor(np.log10(duration_seconds))
        steps = [power / 10, power / 5, power / 2, power]
    step = next((step for step in steps if duration_seconds / step <= 12), duration_seconds / 12)
    return np.arange(int(duration_seconds / step + 1e-9) + 1, dtype=np.float64) * step


def draw_timeline(
    info: TimelineInfo, strip: Strip, frames: npt.NDArray[np.uint8], title: str, models: Sequence[str]
) -> bytes:
    """PNG.

    Args:
        frames: (N, H, W, 3), those of the strip.
        models: what each model is called, in the order of the lanes' bars.
    """
    rows = sum(sum(lane.rows) + _LANE_GAP_ROWS for lane in info.lanes) or 1.0
    lanes_inches = rows * _ROW_INCHES
    height = _HEAD_INCHES + strip.height_inches + lanes_inches + _FOOT_INCHES
    width = _LEFT_INCHES + _AXES_INCHES + _RIGHT_INCHES
    with matplotlib.rc_context({"font.size": 9.0}), names_as_written():
        figure = Figure(figsize=(width, height), dpi=_DPI)

        def axes(bottom_inches: float, height_inches: float) -> Any:
            place = _LEFT_INCHES / width, bottom_inches / height, _AXES_INCHES / width, height_inches / height
            drawn = figure.add_axes(place)
            drawn.set_xlim(0, info.duration_seconds)
            drawn.set_yticks([])
            return drawn

        above = axes(_FOOT_INCHES + lanes_inches, strip.height_inches)
        _draw_strip(above, strip, frames, info.duration_seconds)
        _draw_lanes(axes(_FOOT_INCHES, lanes_inches), info, rows)
        figure.text(
            _LEFT_INCHES / width,
            1 - 0.12 / height,
            f"{title}   {clock(info.duration_seconds, info.duration_seconds)}",
            va="top",
            fontsize=11,
        )
        # Of a path the end tells more.
        named = [Patch(color=f"C{k}", label=_short(name[::-1], 55)[::-1]) for k, name in enumerate(models)]
        figure.legend(
            handles=named,
            loc="lower right",
            bbox_to_anchor=(1 - _RIGHT_INCHES / width, -0.02 / height),
            ncols=len(named),
            frameon=False,
        )
        counted = f"{info.drawn} of {info.found} detections"
        figure.text(_LEFT_INCHES / width, 0.08 / height, counted, va="bottom", color="0.35")
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def _draw_strip(axes: Any, strip: Strip, frames: npt.NDArray[np.uint8], duration_seconds: float) -> None:
    axes.set_axis_off()
    for center, frame in zip(strip.centers_seconds, frames, strict=True):
        sides = center - strip.width_seconds / 2, center + strip.width_seconds / 2
        axes.imshow(frame, extent=(*sides, 0, 1), aspect="auto", interpolation="antialiased")
    axes.set(xlim=(0, duration_seconds), ylim=(0, 1))


def _draw_lanes(axes: Any, info: TimelineInfo, rows: float) -> None:
    """Row 0 is on top; a bar is as opaque as its score is high."""
    places, top = [], _LANE_GAP_ROWS / 2
    for number, lane in enumerate(info.lanes):
        bottom = top + sum(lane.rows)
        if number % 2 == 0:
            axes.axhspan(top - _LANE_GAP_ROWS / 2, bottom + _LANE_GAP_ROWS / 2, color="0.95", zorder=0)
        places.append((top + bottom) / 2)
        for model, (bars, count) in enumerate(zip(lane.models, lane.rows, strict=True)):
            for bar in bars:
                middle, color = top + bar.row + 0.5, f"C{model}"
                span = [(bar.start_seconds, bar.end_seconds - bar.start_seconds)]
                low_high = middle - 0.44, 0.88
                axes.broken_barh(span, low_high, facecolor=color, alpha=0.1 + 0.7 * min(bar.score, 1.0))
                axes.broken_barh(span, low_high, facecolor="none", edgecolor=color, linewidth=0.8)
                text = f"{bar.score:.2f}"
                axes.text(bar.label_seconds, middle, f" {text}", va="center_baseline", fontsize=7.5)
            top += count
        top += _LANE_GAP_ROWS
    axes.set_ylim(rows, 0)
    axes.set_yticks(places, [_short(lane.label, 26) for lane in info.lanes])
    axes.tick_params(axis="y", length=0)
    ticks = tick_seconds(info.duration_seconds)
    step = float(ticks[1] - ticks[0]) if len(ticks) > 1 else info.duration_seconds
    axes.set_xticks(ticks, [clock(tick, step) for tick in ticks])
    axes.grid(axis="x", color="0.8", linewidth=0.6)
    axes.set_axisbelow(True)
    if not info.lanes:
        axes.text(0.5, 0.5, "no detection", transform=axes.transAxes, ha="center", va="center", color="0.35")


def _short(text: str, characters: int) -> str:
    text = one_line(text)
    return text if len(text) <= characters else f"{text[: characters - 1]}…"
