"""Before anything long runs: every video is looked at once, and those that cannot be used are left out.

On a cluster the look is taken where workers read the videos: chunks of videos go out as Ray tasks that
reserve what one worker reserves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from pbd_ray.cluster.metrics_export import QUARANTINED
from pbd_ray.cluster.monitoring import Status, say
from pbd_ray.cluster.session import worker_capacity, worker_resources
from pbd_ray.config import ConfigError, Recipe, RunError, UserError, one_line
from pbd_ray.data.annotations import Split, Video
from pbd_ray.data.examine import Finding, examine
from pbd_ray.data.quarantine import NOTHING, Quarantine, quarantine
from pbd_ray.data.source import VideoSource, local_source
from pbd_ray.data.video import VideoError

_CHUNK_VIDEOS = 16


def usable_videos(
    recipe: Recipe, split: Split, stored: Quarantine | None = None
) -> tuple[Split, VideoSource, Quarantine]:
    """The videos that the run uses, where this node reads them, and which ones are left out.

    Args:
        stored: what the first start of the run left out; None: this is the first.

    Raises:
        UserError: too many videos cannot be used, or, where the run began without it, any other one; fewer
            are left to train on than there are `train_workers`.
    """
    generating = Status("generating videos", recipe.execution.progress_seconds)
    source = local_source(recipe, lambda done, of: generating(done / of, f"{done} of {of}"))
    left_out = stored or NOTHING
    if recipe.experiment.data.source == "files":
        split, left_out = _examined(recipe, split, source, stored)
    QUARANTINED.set(len(left_out.reasons))
    workers, fit = recipe.execution.train_workers, len(split.fit.videos)
    if 0 < fit < workers:  # 0: nothing is trained
        raise ConfigError(f"execution.train_workers {workers} is more than the {fit} fit videos")
    counts = ", ".join(f"{len(part.videos)} {name}" for name, part in split.parts.items() if part.videos)
    say(f"videos: {counts}; {len(split.fit.classes)} classes; in {source.data_root}")
    return split, source, left_out


def _examined(
    recipe: Recipe, split: Split, source: VideoSource, stored: Quarantine | None
) -> tuple[Split, Quarantine]:
    videos = split.everything().videos
    found = {finding.video.id: finding for finding in findings(recipe, videos, source)}
    # Tasks end in any order; lines and errors speak of the videos in theirs.
    problems = {video.id: problem for video in videos if (problem := found[video.id].problem) is not None}
    if stored is None:
        left_out = quarantine(split, problems, recipe.experiment.data.max_quarantined)
    else:
        left_out = stored
        _require_the_rest(problems, stored)
        for id_ in sorted(stored.reasons.keys() & found.keys() - problems.keys()):
            say(f"video {id_} can be used now, but the run began without it: it stays out")
    for id_, reason in left_out.reasons.items():
        say(f"quarantined {id_}: {reason}")
    if left_out.reasons:
        shares = ", ".join(f"{share:.1%} of {name}" for name, share in left_out.shares.items() if share)
        say(f"quarantined: {len(left_out.reasons)} videos ({shares}); no candidate sees them")
    return left_out.without(split.map(lambda video: found[video.id].video)), left_out


def _require_the_rest(problems: dict[str, str], stored: Quarantine) -> None:
    fresh = [problem for id_, problem in problems.items() if id_ not in stored.reasons]
    if fresh:
        more = f" (and {len(fresh) - 1} more)" if len(fresh) > 1 else ""
        raise VideoError(f"{fresh[0]}{more}; the run began with this video and cannot go on without it")


def findings(recipe: Recipe, videos: Sequence[Video], source: VideoSource) -> Iterator[Finding]:
    """Look at every video, where `execution.backend` says, as they come; a line now and then says how far.

    Raises:
        UserError: a file lies outside of the data root.
    """
    looking = Status("looking at videos", recipe.execution.progress_seconds)
    local = recipe.execution.backend == "local"
    coming = _here(recipe, videos, source.data_root) if local else _in_tasks(recipe, videos)
    problems = 0
    for done, finding in enumerate(coming, 1):
        problems += finding.problem is not None
        share = f"{done} of {len(videos)}"
        looking(done / len(videos), share, f"{problems} cannot be used" if problems else "")
        yield finding


def _here(recipe: Recipe, videos: Iterable[Video], data_root: str) -> Iterator[Finding]:
    """Findings in the order of the videos; as many at once as a worker has CPUs."""
    with ThreadPoolExecutor(max(1, int(recipe.execution.cpus_per_worker))) as pool:
        yield from pool.map(lambda video: examine(video, data_root), videos)


def _look(recipe: Recipe, videos: Sequence[Video]) -> list[Finding]:
    return list(_here(recipe, videos, local_source(recipe).data_root))


def _in_tasks(recipe: Recipe, videos: Sequence[Video]) -> Iterator[Finding]:
    """Findings as they come. Of a chunk whose process died every video is looked at by itself: one that
    takes down its process every time has a problem too."""
    execution = recipe.execution
    need = worker_resources(execution)
    task: Any = ray.remote(_look)
    shared = ray.put(recipe)
    starts = range(0, len(videos), _CHUNK_VIDEOS)
    waiting = deque(tuple(videos[start : start + _CHUNK_VIDEOS]) for start in starts)
    running: dict[Any, tuple[Video, ...]] = {}
    while waiting or running:
        while waiting and len(running) < worker_capacity(execution):
            chunk = waiting.popleft()
            retries = execution.task_retries if len(chunk) == 1 else 0
            options = task.options(
                name="look at videos",
                num_cpus=need["CPU"],
                num_gpus=need.get("GPU", 0),
                max_retries=retries,
            )
            running[options.remote(shared, chunk)] = chunk
        (ready,), _ = ray.wait(list(running), num_returns=1)
        chunk = running.pop(ready)
        try:
            yield from ray.get(ready)
        except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
            if len(chunk) > 1:
                waiting.extend((video,) for video in chunk)
            elif isinstance(error, WorkerCrashedError):
                yield Finding(chunk[0], f"{chunk[0].path}: whoever decodes it crashes")
            else:
                raise RunError(f"looking at video {chunk[0].id}: {one_line(error)[:300]}") from None
        except RayTaskError as error:
            if isinstance(error.cause, UserError):  # its own line, without the worker's traceback
                raise error.cause from None
            raise
