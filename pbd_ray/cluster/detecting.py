"""One detector on the test videos of a split, wherever the steps run: what evaluation and detection share."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from pbd_ray.cluster.monitoring import throttled
from pbd_ray.compression.blocks import Model
from pbd_ray.compression.scoring import CANDIDATE_DETECTION_SCHEMA
from pbd_ray.config import Recipe, UserError
from pbd_ray.data.annotations import Split
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.slices import plan_slices
from pbd_ray.search.state import TEACHER_ROUND, Steps, SweepTask, Work


def detected_rows(
    recipe: Recipe,
    split: Split,
    steps: Steps,
    model: Model,
    lost: Callable[[str, Exception], None] | None = None,
) -> pa.Table:
    """CANDIDATE_DETECTION_SCHEMA rows of one model on the test videos.

    Args:
        lost: gets each video that does not decode to its end, and why; None: the first one is raised.
    """
    task = SweepTask("test-evaluation", TEACHER_ROUND, model, (), "map", "test")
    # One video a slice: what a video yields does not depend on its slice, and progress speaks of videos.
    plan = plan_slices(split.test.videos, recipe.experiment.detector.grid, len(split.test.videos))
    progress = throttled(recipe.execution.progress_seconds)
    tables: dict[int, pa.Table] = {}

    def keep(work: Work, table: pa.Table) -> None:
        tables[work.piece.index] = table
        first = work.piece.videos[0]
        progress(f"video {len(tables)} of {len(plan)}, {first}: {table.num_rows} detections")

    def tell(work: Work, error: UserError) -> None:
        assert lost is not None
        lost(work.piece.videos[0], error)

    steps.sweep(task, SliceFeed(plan, (), (), keep, lost=tell if lost else None))
    found = [tables[piece.index] for piece in plan if piece.index in tables]
    return pa.concat_tables([CANDIDATE_DETECTION_SCHEMA.empty_table(), *found])
