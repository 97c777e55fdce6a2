"""What a data set is like, as a table and as a picture; the numbers come from `data/statistics.py`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from pbd_ray.data.statistics import Distribution, Statistics
from pbd_ray.report.names import names_as_written
from pbd_ray.report.plain import plain_text

MOST_CLASSES = 40
"""Classes that the table and the picture have room for, the most frequent ones."""
_WIDTH = 110


def statistics_text(statistics: Statistics) -> str:
    """Subsets, lengths and classes, one table each."""
    parts = _table("subset", "videos", "instances", "hours", "in actions")
    for name, part in statistics.parts.items():
        parts.add_row(
            name, str(part.videos), str(part.instances), f"{part.hours:.2f}", f"{part.action_share:.0%}"
        )
    lengths = _table("", "smallest", "5 %", "median", "95 %", "largest")
    for name, one in (
        ("video, s", statistics.video_seconds),
        ("instance, s", statistics.instance_seconds),
        ("instance, share of its video", statistics.instance_share),
        ("instances a video", statistics.instances_per_video),
    ):
        values = (one.smallest, one.fifth, one.median, one.ninety_fifth, one.largest)
        lengths.add_row(name, *(f"{value:.3g}" for value in values))
    shown = _most_frequent(statistics)
    classes = _table("class", *statistics.parts)
    for label, counts in shown.items():
        classes.add_row(escape(label), *map(str, counts.values()))
    if len(shown) < len(statistics.instances):
        classes.add_row(f"and {len(statistics.instances) - len(shown)} more classes")
    return "\n\n".join(plain_text(table, _WIDTH) for table in (parts, lengths, classes))


def draw_statistics(statistics: Statistics) -> bytes:
    """Instances of every class by subset; lengths of instances and videos, instances a video; PNG."""
    shown = _most_frequent(statistics)
    stream = io.BytesIO()
    with names_as_written():
        figure = Figure(figsize=(11, max(6.5, 1.5 + 0.22 * len(shown))), layout="constrained")
        grid = figure.add_gridspec(3, 2)
        _draw_classes(figure.add_subplot(grid[:, 0]), shown, len(statistics.instances))
        for row, (one, xlabel, ylabel) in enumerate(
            (
                (statistics.instance_seconds, "length of an instance, s", "instances"),
                (statistics.video_seconds, "length of a video, s", "videos"),
                (statistics.instances_per_video, "instances in a video", "videos"),
            )
        ):
            _draw_distribution(figure.add_subplot(grid[row, 1]), one, xlabel, ylabel)
        figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def _most_frequent(statistics: Statistics) -> Mapping[str, Mapping[str, int]]:
    ordered = sorted(statistics.instances.items(), key=lambda item: -sum(item[1].values()))
    return dict(ordered[:MOST_CLASSES])


def _draw_classes(axes: Any, classes: Mapping[str, Mapping[str, int]], known: int) -> None:
    rows, before = np.arange(len(classes)), np.zeros(len(classes))
    for name in next(iter(classes.values())):
        counts = np.array([of[name] for of in classes.values()])
        axes.barh(rows, counts, left=before, label=name)
        before += counts
    axes.set_yticks(rows, list(classes))
    axes.invert_yaxis()
    most = "" if known == len(classes) else f"the {len(classes)} most frequent of "
    axes.set_xlabel("instances")
    axes.set_title(f"{most}{known} classes", loc="left", fontsize="medium")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)


def _draw_distribution(axes: Any, one: Distribution, xlabel: str, ylabel: str) -> None:
    axes.stairs(one.counts, one.edges, fill=True)
    if one.on_log_scale:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(one.median, color="black", linestyle="--", linewidth=1, label=f"median {one.median:.3g}")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    return table
