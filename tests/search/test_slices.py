from __future__ import annotations

from dataclasses import replace

import pytest

from pbd_ray.config import Execution, GridConfig
from pbd_ray.data.windows import inference_windows
from pbd_ray.search.slices import plan_slices, scoring_videos, slice_count
from pbd_ray.search.state import Slice

GRID = GridConfig(window_frames=64, feature_steps=64)


def test_count() -> None:
    assert slice_count(Execution(max_workers=3, slices_per_worker=5)) == 15


@pytest.mark.parametrize("count", [1, 2, 3, 8, 20, 50])
@pytest.mark.parametrize("kind", ["sliding", "resize"])
def test_every_video_once_and_balanced(make_videos, count: int, kind: str) -> None:
    grid = GRID.model_copy(update={"kind": kind})
    videos = make_videos("fit", 20, 0).videos
    plan = plan_slices(videos, grid, count)
    assert [piece.index for piece in plan] == list(range(min(count, 20)))
    assert sorted(name for piece in plan for name in piece.videos) == sorted(video.id for video in videos)
    windows = {video.id: len(inference_windows(video, grid)) for video in videos}
    loads = [sum(windows[name] for name in piece.videos) for piece in plan]
    # Greedy: the last video put on the fullest slice went to the one that was then least loaded.
    assert max(loads) - min(loads) <= max(windows.values())
    assert loads == sorted(loads, reverse=True)


def test_order_of_videos_does_not_matter(make_videos) -> None:
    videos = make_videos("fit", 9, 0).videos
    assert plan_slices(videos[::-1], GRID, 4) == plan_slices(videos, GRID, 4)


def test_long_video_stands_alone(make_videos) -> None:
    short = make_videos("fit", 4, 0).videos
    long = replace(short[0], id="long", frames=100_000, duration_seconds=10_000.0)
    plan = plan_slices((*short, long), GRID, 2)
    assert plan[0] == Slice(0, ("long",))


def test_no_videos() -> None:
    assert plan_slices((), GRID, 4) == ()


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 20), (0.5, 10), (0.31, 6), (0.001, 1)])
def test_scoring_videos(make_videos, fraction: float, count: int) -> None:
    fit = make_videos("fit", 20, 0)
    drawn = scoring_videos(fit, fraction, seed=3)
    assert len(drawn.videos) == count
    assert {video.id for video in drawn.videos} <= {video.id for video in fit.videos}
    turned = replace(fit, videos=fit.videos[::-1])
    again = scoring_videos(turned, fraction, seed=3)
    assert {video.id for video in again.videos} == {video.id for video in drawn.videos}
    if 1 < count < 20:
        other = scoring_videos(fit, fraction, seed=4)
        assert {video.id for video in other.videos} != {video.id for video in drawn.videos}
