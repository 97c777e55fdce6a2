"""What was measured on a simulated cluster is what the cluster was made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa
import pytest

from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Annotations, Split
from pbd_ray.data.windows import inference_window_count
from pbd_ray.report.forecast import RunSeconds, UnitSeconds
from pbd_ray.search import profiling
from pbd_ray.search.profiling import STEPS, VIDEOS_PER_WORKER, measure
from pbd_ray.search.state import Alignment, AlignTask, Feed, Model, Steps, SweepTask

WORKERS = 2
ALIGN = RunSeconds(start=20.0, training=0.5, selection=0.25, peak_memory_bytes=7)
FIT = RunSeconds(start=30.0, training=1.5, selection=0.75, peak_memory_bytes=9)
TRUE = UnitSeconds(
    workers=WORKERS, runs_at_once=2, start=8.0, load=0.5, decode=2.0, window=0.125, scoring=1.0, trials=3.0,
    latency=1.25, align=ALIGN, fit=FIT,
)  # fmt: skip
TRIALS_START = 2.0
"""Of `TRUE.trials`, beside the sweep."""


@dataclass
class Cluster:
    """Steps that take the time that `TRUE` says, by a clock of their own."""

    recipe: Recipe
    now: float = 0.0
    cached: set[tuple[str, int]] = field(default_factory=set)
    """(video, short side) of the frames that are in the cache."""
    diverges: bool = False
    """The first learning rate does."""
    trained: list[tuple[Recipe, Split]] = field(default_factory=list)
    scored: list[frozenset[str]] = field(default_factory=list)
    """Videos of every sweep with candidates."""

    def windows(self, part: Annotations) -> int:
        return sum(inference_window_count(v, self.recipe.experiment.detector.grid) for v in part.videos)

    @contextlib.contextmanager
    def steps(self, short: Recipe, few: Split) -> Iterator[Steps]:
        running = False

        def sweep(task: SweepTask, feed: Feed) -> Mapping[str, Any]:
            nonlocal running
            self.now += TRUE.load if running else TRUE.start
            running = True
            losses, videos = task.criterion == "train_loss", []
            self.now += TRIALS_START if task.candidates else 0.0
            while (work := feed.take()) is not None:
                part = few.everything().select(work.piece.videos)
                self.now += self.decoding(short, part, training=losses)
                units = len(part.videos) if losses else self.windows(part)
                self.now += TRUE.scoring * units if task.candidates else TRUE.window * units
                videos += work.piece.videos
                feed.give(work, pa.table({}))
            if task.candidates:
                self.scored.append(frozenset(videos))
            return {}

        def scored(task: SweepTask, scores: Any, final: bool) -> None:
            assert final
            assert {score.block for score in scores} == set(task.candidates)
            self.now += TRUE.trials - TRIALS_START

        def latency(model: Model) -> Mapping[str, float]:
            self.now += TRUE.latency
            return {}

        yield Steps(sweep, lambda task: self.align(short, few, task), latency, scored=scored)

    def decoding(self, short: Recipe, part: Annotations, training: bool) -> float:
        """Seconds until videos are decoded at a size; the cache has them afterwards if the recipe has one."""
        grid = short.experiment.detector.grid
        side = grid.train_short_side_pixels if training else grid.test_short_side_pixels
        kept = self.cached if short.execution.cache_gigabytes else set()
        missing = [video.id for video in part.videos if (video.id, side) not in kept]
        kept |= {(name, side) for name in missing}
        return TRUE.decode * self.windows(part.select(missing))

    def align(self, short: Recipe, few: Split, task: AlignTask) -> Alignment:
        assert len(task.student.kept_blocks) == len(task.teacher.kept_blocks) - 1
        return self._train(short, few, ALIGN, len(short.experiment.alignment.learning_rates))

    def fit(self, short: Recipe, few: Split) -> Alignment:
        return self._train(short, few, FIT, 1)

    def _train(self, short: Recipe, few: Split, true: RunSeconds, rates: int) -> Alignment:
        """Two epochs, the first slower by half, and slower by what has to be decoded."""
        self.trained.append((short, few))
        windows = len(few.fit.videos)
        first = 1.5 * windows * true.training + self.decoding(short, few.fit, training=True)
        selecting = self.windows(few.selection) * true.selection
        selecting += self.decoding(short, few.selection, training=False)
        seconds = first + windows * true.training + selecting
        self.now += true.start + seconds
        run = {
            "seconds": seconds,
            "windows_per_second": [windows / first, 1 / true.training],
            "peak_memory_bytes": true.peak_memory_bytes,
            "diverged": None,
        }
        runs: dict[int, Any] = dict.fromkeys(range(rates), run)
        if self.diverges and rates > 1:
            runs[0] = run | {"windows_per_second": [], "peak_memory_bytes": None, "diverged": "loss nan"}
        return Alignment(1e-4, 2, Model((), {}), pa.table({}), {"learning_rates": runs})


def measured(cluster: Cluster, split: Split, model: Model, monkeypatch: pytest.MonkeyPatch) -> UnitSeconds:
    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return cluster.now

    monkeypatch.setattr(profiling, "time", Clock)
    return measure(
        cluster.recipe, split, model, cluster.steps, cluster.fit, workers=WORKERS, runs_at_once=2,
        report=lambda line: None,
    )  # fmt: skip


def leaves(units: UnitSeconds) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in fields(units):
        value = getattr(units, entry.name)
        if isinstance(value, RunSeconds):
            found |= {f"{entry.name}.{part.name}": getattr(value, part.name) for part in fields(value)}
        else:
            found[entry.name] = value
    return found


@pytest.fixture
def split(make_videos: Callable[..., Annotations]) -> Split:
    return Split(make_videos("fit", 30, 1), make_videos("selection", 5, 2), make_videos("test", 20, 3))


@pytest.mark.parametrize("criterion", ["map", "train_loss", "mse"])
def test_what_is_measured_is_what_it_takes(
    criterion: str, make_recipe, split: Split, first_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(make_recipe(experiment__scoring={"criterion": criterion}))
    found = measured(cluster, split, first_model(), monkeypatch)
    assert leaves(found) == pytest.approx(leaves(TRUE))


@pytest.mark.parametrize("part", ["test", "selection", "fit"])
def test_what_is_cached_from_before_changes_nothing(
    part: str, make_recipe, split: Split, first_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an earlier plan."""
    before = {(video.id, side) for video in split.parts[part].videos for side in (160, 182)}
    found = measured(Cluster(make_recipe(), cached=before), split, first_model(), monkeypatch)
    assert leaves(found) == pytest.approx(leaves(TRUE))


def test_without_a_cache_every_window_is_decoded(
    make_recipe, split: Split, first_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(make_recipe(execution__cache_gigabytes=0))
    found = measured(cluster, split, first_model(), monkeypatch)
    assert found.window == pytest.approx(TRUE.window + TRUE.decode)
    assert found.decode == pytest.approx(0, abs=1e-9)


def test_a_learning_rate_that_diverges_is_left_out(
    make_recipe, split: Split, first_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"experiment__alignment": {"learning_rates": [1e-4, 1e6]}}
    found = measured(Cluster(make_recipe(**changes), diverges=True), split, first_model(), monkeypatch)
    assert leaves(found) == pytest.approx(leaves(TRUE))


def test_what_is_trained_meanwhile(
    make_recipe, split: Split, first_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two short epochs of as many learning rates as run at once, on whole batches of few videos; of these
    as many are scored as two groups have, short and long ones."""
    rates = [1e-5, 1e-4, 1e-3]
    options = {"learning_rates": rates, "halving": True, "optimizer": {"batch_size": 4}}
    changes = {"experiment__alignment": options}
    cluster = Cluster(make_recipe(**changes))
    measured(cluster, split, first_model(), monkeypatch)
    align, fit = cluster.trained
    assert fit[0].experiment.teacher.optimizer.epochs == 2
    assert align[0].experiment.alignment.learning_rates == (1e-5, 1e-4)
    assert align[0].experiment.alignment.halving is None
    batch = align[0].experiment.alignment.optimizer.batch_size
    assert len(align[1].fit.videos) == STEPS * batch
    group, both = cluster.scored
    assert (2 * len(group), len(both)) == (2 * VIDEOS_PER_WORKER * WORKERS,) * 2
    assert group < both
    lengths = [cluster.windows(align[1].fit.select([name])) for name in both]
    every = [cluster.windows(align[1].fit.select([video.id])) for video in align[1].fit.videos]
    assert (min(lengths), max(lengths)) == (min(every), max(every))
    assert Recipe.model_validate(align[0].model_dump()) == align[0]


def test_one_fit_video(make_recipe, split: Split, first_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its group is the second; the first has none."""
    alone = Split(split.fit.select(["fit_00"]), split.selection, split.test)
    found = measured(Cluster(make_recipe()), alone, first_model(), monkeypatch)
    assert leaves(found) == pytest.approx(leaves(TRUE))


def test_one_test_video(make_recipe, split: Split, first_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups cannot be made of it: other videos help out."""
    alone = Split(split.fit, split.selection, split.test.select(["test_00"]))
    found = measured(Cluster(make_recipe()), alone, first_model(), monkeypatch)
    assert found.window == pytest.approx(TRUE.window)
