"""A detector that runs in milliseconds, on random windows and on small generated videos."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from pbd_ray.compression.blocks import Model, from_detector
from pbd_ray.compression.jobs import FineTuneJob, alignment_job
from pbd_ray.config import DetectorConfig, Recipe, load_recipe
from pbd_ray.data import synthetic
from pbd_ray.data.annotations import Split
from pbd_ray.data.cache import FrameCache
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.data.source import VideoSource, load_split
from pbd_ray.detector.detector import Detector

SMALLER = (
    "data.synthetic.fit_videos=4",
    "data.synthetic.selection_videos=2",
    "data.synthetic.test_videos=1",
    "detector.backbone.depth=5",
    "detector.grid.augmentation=none",
    "alignment.optimizer.epochs=3",
    "alignment.optimizer.schedule_epochs=4",
)


@pytest.fixture(scope="session")
def make_recipe(tiny_recipe: str) -> Callable[..., Recipe]:
    """The tiny recipe, smaller still, with further `key=value` overrides."""

    def make(*overrides: str) -> Recipe:
        return load_recipe(tiny_recipe, (*SMALLER, *overrides))

    return make


@pytest.fixture(scope="session")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe()


@pytest.fixture(scope="session")
def config(recipe: Recipe) -> DetectorConfig:
    return recipe.experiment.detector


@pytest.fixture(scope="session")
def split(recipe: Recipe) -> Split:
    return load_split(recipe, print)


@pytest.fixture(scope="session")
def source(recipe: Recipe, video_cache: Path) -> VideoSource:
    """The recipe's generated videos, decoded once."""
    settings = recipe.experiment.data.synthetic
    assert settings is not None
    return VideoSource(
        str(synthetic.ensure(settings, video_cache)), FrameCache(video_cache / "frames", 10**9)
    )


@pytest.fixture(scope="session")
def make_detector(config: DetectorConfig) -> Callable[..., Detector]:
    """A detector in eval mode whose every parameter matters: none at its zero or near-zero start."""

    def make(kept_blocks: Sequence[int] | None = None, seed: int = 0, num_classes: int = 4) -> Detector:
        generator = torch.Generator().manual_seed(seed)
        detector = Detector(config, num_classes)
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                around_one = "norm" in name or "scale" in name
                parameter.copy_(1 + 0.1 * noise if around_one else 0.15 * noise)
            detector.head.class_output.bias.sub_(2.0)
            detector.head.boundary_output.bias.add_(1.0)  # else most boundaries are cut off at 0
        if kept_blocks is None:
            return detector.eval()
        smaller = Detector(config, num_classes, kept_blocks)
        smaller.load_state_dict({name: detector.state_dict()[name] for name in smaller.state_dict()})
        return smaller.eval()

    return make


@pytest.fixture(scope="session")
def make_batch(config: DetectorConfig) -> Callable[..., WindowBatch]:
    """Random windows with an instance or two in each; the last one ends in padding."""

    def make(windows: int, seed: int = 0) -> WindowBatch:
        rng = np.random.default_rng(seed)
        grid = config.grid
        shape = (windows, 3, grid.window_frames, grid.crop_pixels, grid.crop_pixels)
        mask = torch.ones((windows, grid.feature_steps), dtype=torch.bool)
        mask[-1, -7:] = False
        segments = tuple(
            torch.tensor(np.sort(rng.uniform(0, 24, size=(1 + row % 2, 2)), axis=1), dtype=torch.float32)
            for row in range(windows)
        )
        labels = tuple(torch.tensor(rng.integers(0, 4, size=len(segment))) for segment in segments)
        frames = torch.tensor(rng.integers(0, 256, size=shape, dtype=np.uint8))
        # Training looks at tensors only: what the windows are of does not matter.
        return WindowBatch(frames, mask, segments, labels, windows=(None,) * windows)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def teacher(make_detector: Callable[..., Detector]) -> Model:
    return from_detector(make_detector())


@pytest.fixture(scope="session")
def student(make_detector: Callable[..., Detector]) -> Model:
    """The teacher less block 1."""
    return from_detector(make_detector((0, 2, 3, 4)))


@pytest.fixture(scope="session")
def make_job(
    make_recipe: Callable[..., Recipe], split: Split, source: VideoSource, student: Model, teacher: Model
) -> Callable[..., FineTuneJob]:
    """An alignment job of round 1; overrides of the recipe, then of the job's own fields."""

    def make(*overrides: str, **fields: Any) -> FineTuneJob:
        job = alignment_job(make_recipe(*overrides), split, source, 1, student, teacher)
        return replace(job, **fields)

    return make


@dataclass
class Ranks:
    """Processes that are threads: what they sum meets at a barrier."""

    count: int
    values: dict[int, Any] = field(default_factory=dict)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=300)

    def all(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = [self.values[index] for index in range(self.count)]
        self.barrier.wait()
        return values

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """work(rank) of every rank; what one raises, this raises."""
        results: dict[int, Any] = {}

        def target(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results.values():
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return [results[rank] for rank in range(self.count)]


@dataclass(frozen=True)
class ThreadCollective:
    ranks: Ranks
    rank: int

    @property
    def world_size(self) -> int:
        return self.ranks.count

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self.ranks.all(self.rank, value)).sum(dim=0)

    def gather(self, table: pa.Table) -> pa.Table:
        return pa.concat_tables(self.ranks.all(self.rank, table))


class Averaging(nn.Module):
    """What DDP does to gradients: a backward outside `no_sync` leaves their mean over ranks."""

    def __init__(self, module: nn.Module, collective: ThreadCollective) -> None:
        super().__init__()
        self.module, self.collective, self.syncs = module, collective, True
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _average(self, parameter: Tensor) -> None:
        if self.syncs:
            parameter.grad = self.collective.sum(parameter.grad) / self.collective.world_size

    def no_sync(self) -> Any:
        averaging = self

        class Quiet:
            def __enter__(self) -> None:
                averaging.syncs = False

            def __exit__(self, *_: object) -> None:
                averaging.syncs = True

        return Quiet()


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., list[Any]]:
    """on_ranks(count, work): work(collective=..., wrap=...) of every rank, as the keywords of a run."""

    def run(count: int, work: Callable[..., Any]) -> list[Any]:
        ranks = Ranks(count)

        def on_rank(rank: int) -> Any:
            collective = ThreadCollective(ranks, rank)
            return work(collective=collective, wrap=lambda module: Averaging(module, collective))

        return ranks.run(on_rank)

    return run
