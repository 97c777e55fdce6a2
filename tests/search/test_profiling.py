"""What was measured on a simulated cluster is what the cluster was made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa
import pytest

from pbd_ray.config import Recipe, load_recipe
from pbd_ray.data.annotations import Annotations, Split
from pbd_ray.data.source import load_split
from pbd_ray.data.windows import inference_window_count, inference_windows
from pbd_ray.report.forecast import RunSeconds, UnitSeconds
from pbd_ray.search import profiling
from pbd_ray.search.profiling import STEPS, measure, uncached_share, workload
from pbd_ray.search.state import Alignment, AlignTask, Feed, Model, Steps, SweepTask

WORKERS = 2
ALIGN = RunSeconds(start=20.0, training=0.5, selection=0.25, peak_memory_bytes=7)
FIT = RunSeconds(start=30.0, training=1.5, selection=0.75, peak_memory_bytes=9)
TRUE = UnitSeconds(
    workers=WORKERS, runs_at_once=2, start=8.0, load=0.5, decode=2.0, window=0.125, scoring=1.0, trials=3.0,
    latency=1.25, align=ALIGN, fit=FIT,
)  # fmt: skip


@dataclass
class Cluster:
    """Steps that take the time that `TRUE` says, by a clock of their own."""

    recipe: Recipe
    now: float = 0.0
    cached: set[str] = field(default_factory=set)
    """Videos whose frames are in the cache."""
    diverges: bool = False
    """The first learning rate does."""
    trained: list[tuple[Recipe, Split]] = field(default_factory=list)

    def windows(self, part: Annotations) -> int:
        return sum(inference_window_count(v, self.recipe.experiment.detector.grid) for v in part.videos)

    @contextlib.contextmanager
    def steps(self, short: Recipe, few: Split) -> Iterator[Steps]:
        running = False

        def sweep(task: SweepTask, feed: Feed) -> Mapping[str, Any]:
            nonlocal running
            self.now += TRUE.load if running else TRUE.start
            running = True
            criterion, everything = task.criterion, few.everything()
            while (work := feed.take()) is not None:
                for name in work.piece.videos:
                    windows = self.windows(everything.select([name]))
                    self.now += self.decoding(short, name, windows)
                    units = 1 if criterion == "train_loss" else windows
                    self.now += TRUE.scoring * units if task.candidates else TRUE.window * windows
                feed.give(work, pa.table({}))
            return {}

        def scored(task: SweepTask, scores: Any, final: bool) -> None:
            assert final
            assert {score.block for score in scores} == set(task.candidates)
            self.now += TRUE.trials

        def latency(model: Model) -> Mapping[str, float]:
            self.now += TRUE.latency
            return {}

        yield Steps(sweep, lambda task: self.align(short, few, task), latency, scored=scored)

    def decoding(self, short: Recipe, name: str, windows: int) -> float:
        """Seconds until a video is decoded, by whom the cache has it afterwards if the recipe has one."""
        if name in self.cached and short.execution.cache_gigabytes:
            return 0.0
        if short.execution.cache_gigabytes:
            self.cached.add(name)
        return TRUE.decode * windows

    def align(self, short: Recipe, few: Split, task: AlignTask) -> Alignment:
        assert len(task.student.kept_blocks) == len(task.teacher.kept_blocks) - 1
        return self._train(short, few, ALIGN, len(short.experiment.alignment.learning_rates))

    def fit(self, short: Recipe, few: Split) -> Alignment:
        return self._train(short, few, FIT, 1)

    def _train(self, short: Recipe, few: Split, true: RunSeconds, rates: int) -> Alignment:
        """Two epochs, the first slower by half, and slower by what has to be decoded."""
        self.trained.append((short, few))
        windows, size = len(few.fit.videos), self.windows(few.selection)
        selecting = size * true.selection + sum(
            self.decoding(short, video.id, self.windows(few.selection.select([video.id])))
            for video in few.selection.videos
        )
        seconds = 2.5 * windows * true.training + selecting
        self.now += true.start + seconds
        run = {
            "seconds": seconds,
            "windows_per_second": [1 / (1.5 * true.training), 1 / true.training],
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
    before = {video.id for video in split.parts[part].videos}
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
    """Two short epochs of as many learning rates as run at once, on whole batches of few videos."""
    rates = [1e-5, 1e-4, 1e-3]
    changes = {"experiment__alignment": {"learning_rates": rates, "halving": True}}
    cluster = Cluster(make_recipe(**changes))
    measured(cluster, split, first_model(), monkeypatch)
    align, fit = cluster.trained
    assert fit[0].experiment.teacher.optimizer.epochs == 2
    assert align[0].experiment.alignment.learning_rates == (1e-5, 1e-4)
    assert align[0].experiment.alignment.halving is None
    batch = align[0].experiment.alignment.optimizer.batch_size
    assert len(align[1].fit.videos) == STEPS * batch
    assert Recipe.model_validate(align[0].model_dump()) == align[0]


def test_one_test_video(make_recipe, split: Split, first_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups cannot be made of it: other videos help out."""
    alone = Split(split.fit, split.selection, split.test.select(["test_00"]))
    found = measured(Cluster(make_recipe()), alone, first_model(), monkeypatch)
    assert found.window == pytest.approx(TRUE.window)


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ([], {}),
        (["scoring.criterion=train_loss"], {"scoring": 6}),
        (["alignment.optimizer.batch_size=4"], {"epoch": 4}),
        (["paper_protocol=true"], {"selection": "test"}),
    ],
)
def test_workload(overrides: list[str], changes: dict[str, Any], tiny_recipe: str) -> None:
    """6 fit videos, which all score, in batches of 2."""
    recipe = load_recipe(tiny_recipe, overrides)
    split = load_split(recipe, print)
    grid = recipe.experiment.detector.grid
    windows = {
        name: sum(len(inference_windows(video, grid)) for video in part.videos)
        for name, part in split.parts.items()
    }
    found = workload(recipe, split)
    expected = {
        **windows,
        "scored": windows["fit"],
        "scoring": windows["fit"],
        "epoch": 6,
    } | {key: windows[value] if isinstance(value, str) else value for key, value in changes.items()}
    assert asdict(found) == expected


def test_uncached_share(tiny_recipe: str) -> None:
    """13 videos, some 5 to 8 s at 20 frames a second, every second frame, 20 pixels high."""
    recipe = load_recipe(tiny_recipe)
    split = load_split(recipe, print)
    frames = sum(-(-video.frames // 2) for video in split.everything().videos)
    needed = frames * 20 * (20 * 16 / 9) * 3 / 1e9
    half = load_recipe(tiny_recipe, [f"cache_gigabytes={needed / 2}"])
    assert uncached_share(half, split) == pytest.approx(0.5, abs=0.02)
    assert uncached_share(recipe, split) == 0.0
    assert uncached_share(load_recipe(tiny_recipe, ["cache_gigabytes=0"]), split) == 1.0


def test_two_sizes_of_the_fit_videos(tiny_recipe: str) -> None:
    """Training reads 24 pixels, scoring 20: both are kept."""
    recipe = load_recipe(tiny_recipe, ["detector.grid.train_short_side_pixels=24"])
    split = load_split(recipe, print)
    frames = {name: sum(-(-v.frames // 2) for v in part.videos) for name, part in split.parts.items()}
    rest = (frames["selection"] + frames["test"]) * 20**2
    needed = (frames["fit"] * (24**2 + 20**2) + rest) * 16 / 9 * 3 / 1e9
    changes = {"execution": recipe.execution.model_copy(update={"cache_gigabytes": needed / 4})}
    assert uncached_share(recipe.model_copy(update=changes), split) == pytest.approx(0.75, abs=0.01)
