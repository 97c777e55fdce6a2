"""The plan of slices: which videos one worker scores in one go.

A plan is made from video metadata alone and written before the first slice; what it was made for
(workers, slices a worker) may change on a resume, the written plan does not.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pbd_ray.config import Execution, GridConfig
from pbd_ray.data.annotations import Annotations, Video
from pbd_ray.data.windows import inference_window_count
from pbd_ray.search.state import Slice


def slice_count(execution: Execution) -> int:
    """Slices to aim at: `slices_per_worker` for each worker there may be."""
    return execution.max_workers * execution.slices_per_worker


def plan_slices(videos: Sequence[Video], grid: GridConfig, count: int) -> tuple[Slice, ...]:
    """At most `count` slices of near-equal work that hold every video once.

    Longest first onto the least loaded slice; work is counted in windows, then in video frames. The
    plan does not depend on the order of `videos`. Slices come heaviest first, so that the tail is short.
    """
    work = {video.id: (inference_window_count(video, grid), video.frames) for video in videos}
    order = sorted(work, key=lambda name: (-work[name][0], -work[name][1], name))
    heap = [(0, 0, index) for index in range(min(count, len(order)))]
    members: list[list[str]] = [[] for _ in heap]
    for name in order:
        windows, frames, index = heapq.heappop(heap)
        members[index].append(name)
        heapq.heappush(heap, (windows + work[name][0], frames + work[name][1], index))
    heaviest_first = sorted(heap, key=lambda load: (-load[0], -load[1], load[2]))
    return tuple(Slice(place, tuple(members[load[2]])) for place, load in enumerate(heaviest_first))


def plan_stages(
    videos: Sequence[Video], cuts: Sequence[int], grid: GridConfig, count: int
) -> tuple[Slice, ...]:
    """Slices of `videos`, whose order is the order of scoring, in stages that end after each of `cuts`
    videos; at most `count` slices a stage. No cuts: one stage."""
    plan: list[Slice] = []
    for stage, (begin, end) in enumerate(pairwise((0, *cuts, len(videos)))):
        for piece in plan_slices(videos[begin:end], grid, count):
            plan.append(Slice(len(plan), piece.videos, stage))
    return tuple(plan)


def race_order(videos: Sequence[Video], seed: int, round: int) -> tuple[Video, ...]:
    """The videos in a random order drawn by (seed, round), whatever order they come in."""
    listed = sorted(videos, key=lambda video: video.id)
    rng = np.random.default_rng(np.random.SeedSequence((seed, _ORDER, round)))
    return tuple(listed[index] for index in rng.permutation(len(listed)))


def scoring_videos(fit: Annotations, fraction: float, seed: int) -> Annotations:
    """The share of the fit videos that scores: the same ones in every round, drawn once by `seed`.

    Independent of the order of the videos in the annotations; at least one video.
    """
    if fraction >= 1:
        return fit
    names = sorted(video.id for video in fit.videos)
    count = max(1, round(fraction * len(names)))
    drawn = np.random.default_rng(np.random.SeedSequence((seed, _DRAW))).permutation(len(names))[:count]
    return fit.select([names[index] for index in sorted(drawn)])


_DRAW, _ORDER = 0x51CE, 0x0D3
"""Keep these draws apart from others made with the recipe's seed."""
