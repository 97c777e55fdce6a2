"""From head outputs to detections: decoding, non-maximum suppression, segment voting.

Everything runs on the CPU in numpy and is deterministic: ties always go to the lowest input index.
The numbers follow the released post-processing (OpenTAD `batched_nms`: soft-NMS of Bodla et al.,
ICCV 2017, in one dimension, float32), except that nothing is rounded before suppression.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pbd_ray.config import GridConfig, PostprocessConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA
from pbd_ray.data.windows import Window, grid_to_seconds
from pbd_ray.detector.detector import DetectorOutput

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

REMOVED = np.float32(-1)
"""Score of a proposal that is out of the running; real scores are probabilities, so never negative."""
ZERO = np.float32(0)
UNION_EPSILON = np.float32(1e-6)
"""Added to every length, so that zero-length proposals have a defined overlap (as in the release)."""
SPARSE = 4
"""Where fewer than one in this many proposals overlap a pick, only these are visited."""
VOTING_ELEMENTS = 4_000_000
"""Overlap matrix elements segment voting holds at a time."""


@dataclass(frozen=True, eq=False)
class WindowProposals:
    """What one window proposes before suppression, best score first.

    segments_steps (n, 2) float32 on the feature grid, not clipped; labels (n,) int32; scores (n,) float32
    in [0, 1]. No more than this, as scoring keeps it of every candidate and window until a video's end.
    """

    window: Window
    segments_steps: Floats
    labels: npt.NDArray[np.int32]
    scores: Floats

    def segments_seconds(self, grid: GridConfig) -> Doubles:
        """(n, 2) float64 in the video, clipped to [0, duration]."""
        return _clipped_seconds(self.segments_steps.astype(np.float64), self.window, grid)


def decode(
    output: DetectorOutput, windows: Sequence[Window], postprocess: PostprocessConfig
) -> tuple[WindowProposals, ...]:
    """Proposals of each window of a batch (design, section 2: threshold, then the window's top).

    A point t of a level with stride s and offsets (l, r) proposes [t - l s, t + r s] for every class.
    Proposals scoring above `score_threshold` (0 keeps all) compete over all levels and classes of the
    window for the `pre_nms_top` places; equal scores rank by (point, class).

    Args:
        output: logits (B, P, C), offsets (B, P, 2), mask (B, P), points (P, 4) = (t, lo, hi, stride).
        windows: the B windows the batch was made from.
    """
    batch, _, num_classes = output.logits.shape
    assert len(windows) == batch, f"{len(windows)} windows for a batch of {batch}"
    scores = output.logits.detach().float().sigmoid().cpu().numpy()
    offsets = output.offsets.detach().float().cpu().numpy()
    mask = output.mask.detach().cpu().numpy().astype(bool)
    points = output.points.detach().float().cpu().numpy()

    proposals = []
    for row, window in enumerate(windows):
        allowed = mask[row][:, None]
        if postprocess.score_threshold > 0:
            allowed = allowed & (scores[row] > np.float32(postprocess.score_threshold))
        candidates = np.flatnonzero(np.broadcast_to(allowed, scores[row].shape))
        chosen = candidates[_top(scores[row].reshape(-1)[candidates], postprocess.pre_nms_top)]
        point, label = np.divmod(chosen, num_classes)
        centre, stride = points[point, 0], points[point, 3]
        start = centre - offsets[row, point, 0] * stride
        end = centre + offsets[row, point, 1] * stride
        proposals.append(
            WindowProposals(
                window=window,
                segments_steps=np.stack((start, end), axis=1),
                labels=label.astype(np.int32),
                scores=scores[row].reshape(-1)[chosen],
            )
        )
    return tuple(proposals)


def suppress(
    segments: npt.ArrayLike, scores: npt.ArrayLike, labels: npt.ArrayLike, postprocess: PostprocessConfig
) -> tuple[Doubles, Floats, npt.NDArray[np.int32]]:
    """Non-maximum suppression and, class-agnostic only, segment voting.

    Args:
        segments: (n, 2) in any unit; scores: (n,) in [0, 1]; labels: (n,).
        postprocess: `nms`, `sigma`, `iou_threshold`, `min_score`, `per_class`, `max_detections`,
            `voting_iou`. Voting is ignored per class, where too few segments overlap (as released).

    Returns:
        segments (k, 2) float64, decayed scores (k,) float32, labels (k,) int32; best score first,
        equal scores by class, then in the order of selection; k <= max_detections.
    """
    where = np.asarray(segments, dtype=np.float64).reshape(-1, 2)
    first = np.asarray(scores, dtype=np.float32).reshape(-1)
    label = np.asarray(labels, dtype=np.int64).reshape(-1)
    group = label if postprocess.per_class else np.zeros_like(label)
    kept, decayed = _select(where.astype(np.float32), first, group, postprocess)
    result = where[kept]
    if not postprocess.per_class and postprocess.voting_iou > 0 and len(kept):
        result = _vote(result, where, first, postprocess.voting_iou)
    return result, decayed, label[kept].astype(np.int32)


def detections_of_video(
    outputs: Iterable[tuple[DetectorOutput, Sequence[Window]]],
    grid: GridConfig,
    postprocess: PostprocessConfig,
    num_classes: int,
) -> pa.Table:
    """Detections of one video from the outputs of all its window batches.

    Sliding windows are pooled in seconds and then suppressed. A resized video is one window: it is
    suppressed on the feature grid, where all videos have the same length, and then put into seconds.

    Args:
        outputs: (output, its windows) of each batch, streamed; all windows of one video.
        num_classes: the C every output must have.

    Returns:
        Table of DETECTION_SCHEMA, best score first.
    """
    pooled: list[WindowProposals] = []
    for output, windows in outputs:
        assert output.logits.shape[-1] == num_classes, f"{output.logits.shape[-1]} classes, not {num_classes}"
        pooled.extend(decode(output, windows, postprocess))
    return detections_of_proposals(pooled, grid, postprocess)


def detections_of_proposals(
    pooled: Sequence[WindowProposals], grid: GridConfig, postprocess: PostprocessConfig
) -> pa.Table:
    """Detections of one video from the proposals of all its windows; else as `detections_of_video`."""
    if not pooled:
        return DETECTION_SCHEMA.empty_table()
    videos = {proposal.window.video for proposal in pooled}
    assert len(videos) == 1, f"windows of several videos: {sorted(videos)}"

    labels = np.concatenate([proposal.labels for proposal in pooled])
    scores = np.concatenate([proposal.scores for proposal in pooled])
    if grid.kind == "resize":
        assert len(pooled) == 1, f"a resized video has one window, not {len(pooled)}"
        steps, scores, labels = suppress(pooled[0].segments_steps, scores, labels, postprocess)
        segments = _clipped_seconds(steps, pooled[0].window, grid)
    else:
        seconds = np.concatenate([proposal.segments_seconds(grid) for proposal in pooled])
        segments, scores, labels = suppress(seconds, scores, labels, postprocess)
    return _table(pa.repeat(pa.scalar(videos.pop(), pa.string()), len(scores)), segments, labels, scores)


def _table(
    video: pa.Array | pa.ChunkedArray,
    segments: Doubles,
    labels: npt.NDArray[np.int32],
    scores: npt.NDArray[np.floating],
) -> pa.Table:
    columns = [video, segments[:, 0], segments[:, 1], labels, scores.astype(np.float64)]
    return pa.table(columns, schema=DETECTION_SCHEMA)


def _clipped_seconds(steps: Doubles, window: Window, grid: GridConfig) -> Doubles:
    seconds = np.asarray(grid_to_seconds(steps, window, grid), dtype=np.float64)
    return np.clip(seconds, 0.0, window.duration_seconds)


def _top(scores: Floats, count: int) -> Ints:
    """Indices of the `count` best scores, best first, ties by index: a stable sort, but cheaper."""
    index = np.arange(len(scores))
    if len(scores) > count:
        last = np.partition(scores, len(scores) - count)[len(scores) - count]
        above, equal = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
        index = np.sort(np.concatenate((above, equal[: count - len(above)])))
    return index[np.argsort(-scores[index], kind="stable")]


def _select(
    segments: Floats, scores: Floats, groups: Ints, postprocess: PostprocessConfig
) -> tuple[Ints, Floats]:
    """(input index, decayed score) of what suppression keeps, best first, ties by group.

    All groups (classes) advance in lockstep as rows of one padded matrix: a step takes the best of
    every row and decays the rest of it, so its numpy calls are paid once for all classes. Rows of
    similar size share a matrix, which bounds the padding by a half.

    Scores only ever fall, hence a row yields its picks in descending order. So a row whose best is
    below the `max_detections`-th best pick so far cannot contribute any more and is dropped. This is
    exact, not pruning: every proposal that could still be returned, or decay one that is, stays.

    `benchmarks/metrics.py` measures it. One thread of a machine that also did other work, 8000 proposals,
    2000 asked for (all asked for): 20 classes 8 (20) ms, one class 90 (300) ms. The released compiled
    kernel, which always ranks all, took 21 and 270 ms.
    """
    if postprocess.nms == "hard" and postprocess.min_score > 0:  # the one case that filters beforehand
        eligible = np.flatnonzero(scores > np.float32(postprocess.min_score))
    else:
        eligible = np.arange(len(scores))
    order = eligible[np.argsort(groups[eligible], kind="stable")]
    _, begins, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    by_size = np.argsort(-sizes, kind="stable")
    picks: list[Ints] = [np.empty(0, dtype=np.int64)]
    picked_scores: list[Floats] = [np.empty(0, dtype=np.float32)]
    floor = np.float32(max(postprocess.min_score, 0.0))
    top = np.empty(0, dtype=np.float32)  # the best `max_detections` of the first `ranked` picks
    ranked = 0

    position = 0
    while position < len(by_size):
        widest = int(sizes[by_size[position]])
        rows = by_size[position:]
        rows = rows[2 * sizes[rows] >= widest]
        position += len(rows)
        column = np.arange(widest)
        live = column < sizes[rows, None]
        index = order[np.where(live, begins[rows, None] + column, 0)]
        start, end = segments[index, 0], segments[index, 1]
        length = end - start + UNION_EPSILON
        end[~live] = -np.inf  # padding, like a removed one, overlaps nothing: no decay ever touches its score
        current = np.where(live, scores[index], REMOVED)
        first_of_row = np.arange(len(current)) * current.shape[1]
        steps = 0
        while steps < postprocess.max_detections:
            best = first_of_row + current.argmax(axis=1)  # into the flattened matrices: `take` is quicker
            best_score = current.take(best)
            if best_score.min() < floor:
                going = best_score >= floor
                if not going.any():
                    break
                index, start, end, length, current = (x[going] for x in (index, start, end, length, current))
                first_of_row = first_of_row[: len(current)]
                continue
            picks.append(index.take(best))
            picked_scores.append(best_score)
            _decay(current, start, end, length, best, postprocess)
            current.put(best, REMOVED)
            end.put(best, -np.inf)
            steps += 1
            if steps % 64 == 0:
                top, ranked = np.concatenate((top, *picked_scores[ranked:])), len(picked_scores)
                if len(top) >= postprocess.max_detections:
                    rank = len(top) - postprocess.max_detections
                    top = np.partition(top, rank)[rank:]
                    floor = max(floor, top[0])
                left = int((current >= 0).sum(axis=1).max())
                if 4 * left < 3 * current.shape[1]:  # squeeze the removed ones out, order kept
                    keep = np.argsort(current < 0, axis=1, kind="stable")[:, : max(left, 1)]
                    index, start, end, length, current = (
                        np.take_along_axis(x, keep, axis=1) for x in (index, start, end, length, current)
                    )
                    first_of_row = np.arange(len(current)) * current.shape[1]
    picked, decayed = np.concatenate(picks), np.concatenate(picked_scores)
    final = np.lexsort((groups[picked], -decayed))[: postprocess.max_detections]
    return picked[final], decayed[final]


def _decay(
    current: Floats, start: Floats, end: Floats, length: Floats, best: Ints, postprocess: PostprocessConfig
) -> None:
    """Lower `current` scores (R, N) in place by their row's overlap with its pick (soft-NMS, equations 2, 3).

    Args:
        best: (R,) the picks, as indices into the flattened matrices.
    """
    shared = np.minimum(end, end.take(best)[:, None])
    shared -= np.maximum(start, start.take(best)[:, None])
    lengths = length.take(best)
    if postprocess.nms == "gaussian":
        near = (shared > ZERO).reshape(-1).nonzero()[0]
        if SPARSE * len(near) < current.size:  # the others would be multiplied by 1
            own = shared.take(near)
            union = length.take(near) + lengths.take(near // current.shape[1])
            current.put(near, current.take(near) * _gaussian(_divided(own, union), postprocess.sigma))
            return
    np.maximum(shared, ZERO, out=shared)
    overlap = _divided(shared, length + lengths[:, None])
    if postprocess.nms == "gaussian":
        current *= _gaussian(overlap, postprocess.sigma)
        return
    over = overlap >= np.float32(postprocess.iou_threshold)
    if postprocess.nms == "hard":
        current[over] = REMOVED
    else:
        np.multiply(current, 1 - overlap, out=current, where=over)


def _divided(shared: Floats, lengths: Floats) -> Floats:
    """Intersection over union from intersection and both lengths. In place: a step is memory bound."""
    lengths -= shared
    shared /= lengths
    return shared


def _gaussian(overlap: Floats, sigma: float) -> Floats:
    """exp(-overlap^2 / sigma), in place."""
    overlap *= overlap
    overlap /= np.float32(-sigma)
    return np.exp(overlap, out=overlap)


def _vote(kept: Doubles, segments: Doubles, scores: Floats, voting_iou: float) -> Doubles:
    """Replace each kept segment by the score-weighted mean of all segments it overlaps enough.

    Weights are the scores before suppression; a segment always votes for itself unless its length
    or score is 0, in which case it stays as it is.
    """
    voted = kept.copy()
    weight_of = scores.astype(np.float64)
    rows = max(1, VOTING_ELEMENTS // len(segments))
    for begin in range(0, len(kept), rows):
        mine = kept[begin : begin + rows, None]
        intersection = np.minimum(mine[..., 1], segments[:, 1]) - np.maximum(mine[..., 0], segments[:, 0])
        np.maximum(intersection, 0, out=intersection)
        union = (mine[..., 1] - mine[..., 0]) + (segments[:, 1] - segments[:, 0]) - intersection
        weights = np.where((intersection >= voting_iou * union) & (union > 0), weight_of, 0.0)
        total = weights.sum(axis=1)
        some = total > 0
        voted[begin : begin + rows][some] = (weights @ segments)[some] / total[some, None]
    return voted
