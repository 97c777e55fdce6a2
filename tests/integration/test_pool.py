"""The scoring pool on a real Ray: the rows of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray

from pbd_ray.cluster.pool import ScoringPool, WorkersLost
from pbd_ray.compression.blocks import UNDROPPED, from_detector, to_detector
from pbd_ray.compression.jobs import initial_model
from pbd_ray.config import Recipe, load_recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import load_split, local_source
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.in_process import in_process_steps
from pbd_ray.search.slices import plan_slices
from pbd_ray.search.state import Slice, SweepTask

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def recipe(tiny_recipe: str, video_cache: Path) -> Recipe:
    return load_recipe(tiny_recipe, [f"cache_dir={video_cache}"])


@pytest.fixture(scope="module")
def split(recipe: Recipe) -> Split:
    return load_split(recipe, print)


@pytest.fixture(scope="module")
def task(recipe: Recipe, split: Split) -> SweepTask:
    """Scores that are not all zero: train loss needs no trained detector."""
    num_classes = len(split.fit.classes)
    student = from_detector(
        to_detector(initial_model(recipe, num_classes, print), recipe.experiment.detector, num_classes)
    )
    return SweepTask("round-01-scores", 1, student, student.kept_blocks, "train_loss", "fit")


def sweep(pool: ScoringPool, task: SweepTask, plan: tuple[Slice, ...]) -> tuple[pa.Table, dict[str, object]]:
    tables: dict[int, pa.Table] = {}
    feed = SliceFeed(plan, task.candidates, (), lambda work, table: tables.update({work.piece.index: table}))
    facts = pool.run(task, feed)
    return pa.concat_tables([tables[piece.index] for piece in plan]), facts


@pytest.fixture(scope="module")
def expected(recipe: Recipe, split: Split, task: SweepTask) -> pa.Table:
    """Rows of the same sweep in this process."""
    steps = in_process_steps(recipe, split, local_source(recipe), lambda line: None)
    tables: list[pa.Table] = []
    plan = plan_slices(split.fit.videos, recipe.experiment.detector.grid, 6)
    steps.sweep(task, SliceFeed(plan, task.candidates, (), lambda work, table: tables.append(table)))
    return pa.concat_tables(tables).sort_by([("video", "ascending"), ("candidate", "ascending")])


@pytest.mark.parametrize("slices", [1, 6])
def test_rows_are_those_of_one_process(
    slices: int, recipe: Recipe, split: Split, task: SweepTask, expected: pa.Table
) -> None:
    pool = ScoringPool(recipe, split.everything())
    plan = plan_slices(split.fit.videos, recipe.experiment.detector.grid, slices)
    rows, facts = sweep(pool, task, plan)
    pool.release()
    assert rows.sort_by([("video", "ascending"), ("candidate", "ascending")]) == expected
    assert set(rows.column("candidate").to_pylist()) == {UNDROPPED, *task.candidates}
    assert facts["retries"] == 0


def test_a_video_that_does_not_decode_costs_only_itself(
    recipe: Recipe, split: Split, task: SweepTask, expected: pa.Table
) -> None:
    """The worker's reason comes back as it is, and the same worker goes on with the other videos."""
    bad = split.fit.videos[2]
    broken = split.map(lambda video: replace(video, frames=9 * video.frames) if video.id == bad.id else video)
    pool = ScoringPool(recipe, broken.everything())
    plan = plan_slices(split.fit.videos, recipe.experiment.detector.grid, len(split.fit.videos))
    tables: list[pa.Table] = []
    lost: dict[str, str] = {}
    feed = SliceFeed(
        plan,
        task.candidates,
        (),
        lambda work, table: tables.append(table),
        lost=lambda work, error: lost.update({work.piece.videos[0]: str(error)}),
    )
    facts = pool.run(task, feed, lambda line: None)
    pool.release()
    (reason,) = lost.items()
    assert reason[0] == bad.id
    assert f"the file has {bad.frames} frames, its annotation says {9 * bad.frames}" in reason[1]
    assert "\n" not in reason[1]
    rows = pa.concat_tables(tables).sort_by([("video", "ascending"), ("candidate", "ascending")])
    assert rows == expected.filter(pc.not_equal(expected["video"], bad.id))
    assert facts["retries"] == 0


def test_latency_is_measured_by_another_worker_if_one_dies(
    recipe: Recipe, split: Split, task: SweepTask
) -> None:
    pool = ScoringPool(recipe, split.everything())
    assert pool.latency(task.model)["p50_ms"] > 0
    (first,) = pool.workers
    ray.kill(first)
    assert pool.latency(task.model)["p50_ms"] > 0
    assert pool.workers != [first]
    pool.release()


def test_workers_that_cannot_start_end_the_sweep(recipe: Recipe, split: Split, task: SweepTask) -> None:
    """One line with the reason, after as many tries as the recipe allows."""
    nowhere = recipe.execution.model_copy(update={"cache_dir": "/proc/nowhere", "task_retries": 1})
    pool = ScoringPool(recipe.model_copy(update={"execution": nowhere}), split.everything())
    plan = plan_slices(split.fit.videos, recipe.experiment.detector.grid, 1)
    with pytest.raises(WorkersLost, match="its start took down 2 workers") as error:
        sweep(pool, replace(task), plan)
    pool.release()
    assert "\n" not in str(error.value)
