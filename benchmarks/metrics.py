"""CPU seconds of decoding, soft-NMS and mAP, side by side with reference loops that give equal results.

    python benchmarks/metrics.py [--json FILE]

One thread, CPU time (not wall time), the best of several repeats. The loops below are the definitions as they
read; results must be equal to theirs, and to golden ones, or the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pbd_ray.config import DetectorConfig, PostprocessConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA, GROUND_TRUTH_SCHEMA, Video
from pbd_ray.data.windows import Window, inference_windows
from pbd_ray.detector.detector import DetectorOutput
from pbd_ray.detector.points import pyramid_points
from pbd_ray.detector.postprocess import detections_of_video, suppress
from pbd_ray.metrics.mean_ap import mean_average_precision

Array = npt.NDArray[Any]
ROOT = Path(__file__).parents[1]
REFERENCES = (ROOT.parent / "shared" / "reference", ROOT / "tests" / "golden" / "data")
TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)
KERNEL = {20: 0.0207, 1: 0.2699}
"""CPU seconds of the release's compiled soft-NMS on 8000 proposals of 20 classes and of one, one thread of
a 2-core Xeon. It ranks all proposals, whatever is asked for."""
OFFICIAL_MAP = 128.0
"""CPU seconds of the official ActivityNet evaluator on 200 videos x 2000 predictions, there too."""


@dataclass(frozen=True)
class Row:
    """One measurement. Seconds are CPU seconds."""

    what: str
    ours_seconds: float
    loop_seconds: float
    published_seconds: float | None
    largest_difference: float
    """Between ours and the loop, over everything that is returned; inf where counts or labels differ."""

    @property
    def loop_ratio(self) -> float:
        return self.loop_seconds / self.ours_seconds

    @property
    def published_ratio(self) -> float | None:
        return None if self.published_seconds is None else self.published_seconds / self.ours_seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    rows = [
        suppression(classes=20, asked=2000),
        suppression(classes=20, asked=8000),
        suppression(classes=1, asked=2000),
        suppression(classes=1, asked=8000),
        whole_video(),
        mean_ap(),
    ]
    golden = golden_differences()
    print(table(rows))
    for name, difference in golden.items():
        print(f"golden {name}: largest difference {difference:.1g}")
    if arguments.json:
        document = {
            "machine": {"processor": platform.processor() or platform.machine(), "threads": 1},
            "rows": [
                asdict(row) | {"loop_ratio": row.loop_ratio, "published_ratio": row.published_ratio}
                for row in rows
            ],
            "golden_differences": golden,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    wrong = [row.what for row in rows if row.largest_difference > 1e-9]
    wrong += [f"golden {name}" for name, difference in golden.items() if difference > 1e-4]
    if not golden:
        print("golden results: none on this machine")
    if wrong:
        print(f"error: results differ: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def suppression(classes: int, asked: int) -> Row:
    """Gaussian soft-NMS of 8000 proposals, per class, `asked` of them returned."""
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 300, 8000)
    segments = np.stack([start, start + rng.exponential(6, 8000)], axis=1)
    scores = (rng.uniform(0, 1, 8000) ** 3).astype(np.float32)
    labels = rng.integers(0, classes, 8000)
    config = PostprocessConfig(max_detections=asked)
    ours, seconds = timed(lambda: suppress(segments, scores, labels, config), repeats=10)
    theirs, loop = timed(lambda: suppress_loop(segments, scores, labels, config), repeats=2)
    spread = f"{classes} classes" if classes > 1 else "one class"
    what = f"soft-NMS, 8000 proposals of {spread}, {'all' if asked == 8000 else asked} returned"
    return Row(what, seconds, loop, KERNEL[classes], difference(ours, theirs))


def suppress_loop(
    segments: Array, scores: Array, labels: Array, config: PostprocessConfig
) -> tuple[Array, Array, Array]:
    """Class by class: take the best and decay the rest by its overlap, until none is left."""
    start, end = segments.astype(np.float32).T
    length = end - start + np.float32(1e-6)
    current = scores.astype(np.float32)
    kept: list[int] = []
    for label in np.unique(labels):
        left = np.flatnonzero(labels == label)
        while len(left):
            place = int(current[left].argmax())
            best, left = left[place], np.delete(left, place)
            kept.append(best)
            shared = np.maximum(np.minimum(end[left], end[best]) - np.maximum(start[left], start[best]), 0)
            overlap = shared / (length[left] + length[best] - shared)
            current[left] *= np.exp(-(overlap**2) / np.float32(config.sigma))
    ranked = np.array(kept)[np.argsort(-current[kept], kind="stable")][: config.max_detections]
    return segments[ranked], current[ranked], labels[ranked]


def whole_video() -> Row:
    """Head outputs of a video's 4 windows to its detections: 2000 proposals a window, 20 classes."""
    config = DetectorConfig()
    video = Video("v", "v.mp4", "test", 256.0, 30.0, 7680, np.zeros((0, 2)), np.zeros(0, np.int32))
    windows = inference_windows(video, config.grid)
    assert len(windows) == 4
    generator = torch.Generator().manual_seed(0)
    points = pyramid_points(config.grid.feature_steps, config.head.regression_ranges)
    shape = (len(windows), len(points))
    output = DetectorOutput(
        torch.randn(*shape, 20, generator=generator) * 1.5 - 5,
        torch.rand(*shape, 2, generator=generator) * 4,
        torch.ones(shape, dtype=torch.bool),
        points,
    )

    def ours() -> tuple[Array, ...]:
        found = detections_of_video([(output, windows)], config.grid, config.postprocess, 20)
        columns = [found.column(name).to_numpy() for name in ("start", "end", "score", "label")]
        return np.stack(columns[:2], axis=1), columns[2].astype(np.float32), columns[3]

    result, seconds = timed(ours, repeats=5)
    expected, loop = timed(lambda: video_loop(output, windows, config), repeats=1)
    what = "decoding and soft-NMS of a video, 4 windows x 2000 proposals of 20 classes"
    return Row(what, seconds, loop, None, difference(result, expected))


def video_loop(
    output: DetectorOutput, windows: Sequence[Window], config: DetectorConfig
) -> tuple[Array, ...]:
    """Point by point and class by class: above the threshold, the window's best, in seconds, NMS."""
    rules, stride_frames = config.postprocess, config.grid.stride_frames
    scores = output.logits.sigmoid().numpy()
    points, offsets = output.points.numpy(), output.offsets.numpy()
    proposals = []
    for row, window in enumerate(windows):
        found = []
        for p, classes in enumerate(scores[row].tolist()):
            found += [(-s, p, label) for label, s in enumerate(classes) if s > rules.score_threshold]
        for _, p, label in sorted(found)[: rules.pre_nms_top]:
            (t, stride), (left, right) = points[p, [0, 3]], offsets[row, p]
            ends = (float(t - left * stride), float(t + right * stride))
            seconds = [(end * stride_frames + window.start_frame) / window.fps for end in ends]
            inside = [min(max(second, 0.0), window.duration_seconds) for second in seconds]
            proposals.append((inside, scores[row, p, label], label))
    columns = [np.array(column) for column in zip(*proposals, strict=True)]
    return suppress_loop(columns[0], columns[1], columns[2], rules)


def mean_ap() -> Row:
    """mAP at 5 tIoU of 200 videos x 2000 predictions of 20 classes, 13 instances a video."""
    rng = np.random.default_rng(0)
    instances = 200 * 13
    begin = rng.uniform(0, 200, instances)
    truth = [np.repeat(np.arange(200), 13), begin, begin + rng.uniform(1, 20, instances)]
    truth.append(rng.integers(0, 20, instances))
    near = rng.integers(0, 13, (200, 2000)) + 13 * np.arange(200)[:, None]  # each is near an instance
    near = near.ravel()
    length = (truth[2] - truth[1])[near]
    start = truth[1][near] + rng.normal(0, 0.3, len(near)) * length
    label = np.where(rng.uniform(size=len(near)) < 0.5, truth[3][near], rng.integers(0, 20, len(near)))
    end = start + length * rng.uniform(0.6, 1.6, len(near))
    score = rng.permutation(len(near)) / len(near)
    found = [truth[0][near], start, end, label, score]
    names = np.array([f"video_{index:03d}" for index in range(200)])
    ground_truth, detections = (
        pa.table([names[columns[0]].tolist(), *columns[1:]], schema=schema)
        for columns, schema in ((truth, GROUND_TRUTH_SCHEMA), (found, DETECTION_SCHEMA))
    )
    scored, seconds = timed(lambda: mean_average_precision(ground_truth, detections, TIOUS, 20), repeats=3)
    expected, loop = timed(lambda: ap_loop(truth, found, 20), repeats=1)
    what = f"mAP, 200 videos x 2000 predictions x {len(TIOUS)} tIoU"
    return Row(what, seconds, loop, OFFICIAL_MAP, difference((scored.ap,), (expected,)))


def ap_loop(truth: Sequence[Array], found: Sequence[Array], classes: int) -> Array:
    """AP (tIoU, class), one prediction and one instance at a time."""
    ap = np.zeros((len(TIOUS), classes))
    instances: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for video, start, end, label in zip(*(column.tolist() for column in truth), strict=True):
        instances.setdefault((label, video), []).append((start, end))
    rows = list(zip(*(column.tolist() for column in found), strict=True))
    for label in range(classes):
        mine = sorted((row for row in rows if row[3] == label), key=lambda row: -row[4])
        positives = sum(len(theirs) for key, theirs in instances.items() if key[0] == label)
        for place, tiou in enumerate(TIOUS):
            taken: set[tuple[int, int]] = set()
            hits = []
            for video, start, end, *_ in mine:
                best, chosen = 0.0, None
                for index, (begin, stop) in enumerate(instances.get((label, video), ())):
                    shared = max(0.0, min(end, stop) - max(start, begin))
                    overlap = shared / ((stop - begin) + (end - start) - shared)
                    if overlap >= max(tiou, best) and (video, index) not in taken:
                        best, chosen = overlap, (video, index)
                hits.append(chosen is not None)
                if chosen is not None:
                    taken.add(chosen)
            true = np.cumsum(hits)
            precision = true / np.arange(1, len(hits) + 1)
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            ap[place, label] = (np.diff(true / positives, prepend=0.0) * envelope).sum()
    return ap


def golden_differences() -> dict[str, float]:
    """Ours against the release's kernel on its golden proposals: the THUMOS14 parameters."""
    from safetensors.numpy import load_file

    folder = next((path for path in REFERENCES if (path / "softnms.safetensors").is_file()), None)
    if folder is None:
        return {}
    golden = load_file(folder / "softnms.safetensors")
    differences = {}
    for size in ("n1000", "n2000"):
        segments, scores, labels = (golden[f"{size}.{key}"] for key in ("segs", "scores", "labels"))
        expected = tuple(golden[f"{size}.thumos.{key}"] for key in ("segs", "scores", "labels"))
        differences[size] = difference(suppress(segments, scores, labels, PostprocessConfig()), expected)
    return differences


def difference(ours: Sequence[Array], theirs: Sequence[Array]) -> float:
    """Largest absolute difference of the arrays; infinite where a shape or a whole number differs."""
    largest = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        whole = np.issubdtype(other.dtype, np.integer)
        if mine.shape != other.shape or (whole and not np.array_equal(mine, other)):
            return float("inf")
        largest = max(largest, float(np.abs(mine.astype(np.float64) - other.astype(np.float64)).max()))
    return largest


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What `run` returns, and the CPU seconds of its quickest repeat."""
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        result = run()
        best = min(best, time.process_time() - began)
    return result, best


def table(rows: Sequence[Row]) -> str:
    width = max(len(row.what) for row in rows)
    lines = [f"{'':{width}}  {'ours':>9}  {'loop':>9}  {'x':>6}  {'published':>9}  {'x':>6}  difference"]
    for row in rows:
        published = "-" if row.published_seconds is None else f"{row.published_seconds * 1e3:.1f}"
        times = "-" if row.published_ratio is None else f"{row.published_ratio:.1f}"
        lines.append(
            f"{row.what:{width}}  {row.ours_seconds * 1e3:9.1f}  {row.loop_seconds * 1e3:9.1f}  "
            f"{row.loop_ratio:6.1f}  {published:>9}  {times:>6}  {row.largest_difference:.1g}"
        )
    note = "CPU milliseconds, one thread; published: the release's kernel and the official evaluator"
    return "\n".join([*lines, note])


if __name__ == "__main__":
    sys.exit(main())
