"""A world in which a whole compression takes milliseconds: numpy weights, detections by formula."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load, save

from pbd_ray.config import Recipe
from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations, Split, Video
from pbd_ray.search.controller import compress
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.owner import Owner
from pbd_ray.search.state import (
    UNDROPPED,
    Alignment,
    AlignTask,
    CandidateScore,
    Cost,
    Feed,
    Model,
    Steps,
    Summary,
    SweepTask,
)
from pbd_ray.search.storage import TEMPORARY, Storage

DEPTH = 4
IMPORTANCE = (0.9, 0.2, 0.7, 0.4)
"""What each block adds to the quality of detections."""
CLASSES = ("jump", "run")


class Killed(BaseException):
    """The driver dies here: nothing below catches it."""


class MortalStorage(Storage):
    """Dies in its `lifetime`-th write, having written half of a temporary file."""

    def __init__(self, storage: Storage, lifetime: int | None = None) -> None:
        super().__init__(storage.filesystem, storage.root)
        self.lifetime = lifetime
        self.writes: list[str] = []

    def write(self, name: str, content: bytes) -> None:
        self.writes.append(name)
        if self.lifetime is not None and len(self.writes) > self.lifetime:
            self.filesystem.create_dir(f"{self.root}/{name}".rpartition("/")[0], recursive=True)
            self._put(f"{self.root}/{name}{TEMPORARY}dead", content[: len(content) // 2])
            raise Killed(name)
        super().write(name, content)


def videos(subset: str, count: int, seed: int) -> Annotations:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        seconds = float(rng.integers(30, 90))
        starts = np.sort(rng.uniform(0, seconds - 5, size=3))
        made.append(
            Video(
                id=f"{subset}_{index:02d}",
                path=f"{subset}_{index:02d}.mp4",
                subset=subset,
                duration_seconds=seconds,
                fps=10.0,
                frames=int(seconds * 10),
                segments_seconds=np.stack([starts, starts + 4.0], axis=1),
                labels=rng.integers(0, 2, size=3).astype(np.int32),
            )
        )
    return Annotations(CLASSES, tuple(made))


def recipe(**changes: Any) -> Recipe:
    """A small recipe; a change's key is a dotted path inside it, '__' for the dot."""
    raw: dict[str, Any] = {
        "experiment": {
            "name": "tiny",
            "data": {},
            "detector": {
                "backbone": {"depth": DEPTH},
                "grid": {"window_frames": 64, "feature_steps": 64},
            },
            "stopping": {"max_drops": 2},
            "evaluation": {"bootstrap_replicates": 20},
        },
        "execution": {"max_workers": 2, "slices_per_worker": 2},
    }
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return Recipe.model_validate(raw)


def teacher_model() -> Model:
    weights = {f"backbone.blocks.{i}.w": np.array([IMPORTANCE[i]], np.float32) for i in range(DEPTH)}
    return Model(tuple(range(DEPTH)), weights | {"head.w": np.arange(3, dtype=np.float32)})


def to_bundle(model: Model, facts: Mapping[str, Any]) -> dict[str, bytes]:
    config = {"kept_blocks": list(model.kept_blocks), "facts": dict(facts)}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(dict(model.weights))}


def from_bundle(files: Mapping[str, bytes], where: str) -> Model:
    kept = tuple(json.loads(files["config.json"])["kept_blocks"])
    return Model(kept, load(files["model.safetensors"]))


def quality(model: Model, dropped: int) -> float:
    """Between 0 and 1, one for all blocks of the teacher."""
    kept = [block for block in model.kept_blocks if block != dropped]
    total = sum(float(model.weights[f"backbone.blocks.{block}.w"][0]) for block in kept)
    return min(1.0, total / sum(IMPORTANCE))


@dataclass
class World:
    """Fake steps that count what they are asked, and one way to run the loop on them."""

    recipe: Recipe = field(default_factory=recipe)
    split: Split = field(
        default_factory=lambda: Split(videos("fit", 7, 1), videos("selection", 3, 2), videos("test", 6, 3))
    )
    perfect: bool = False
    """Every candidate detects everything: map scoring is saturated and tied."""
    slices: list[tuple[str, int]] = field(default_factory=list)
    """Slices that were handed over, in order."""
    forks: int = 0
    """(candidate, video) pairs that were scored."""
    tasks: list[SweepTask] = field(default_factory=list)
    aligned: list[AlignTask] = field(default_factory=list)
    told: list[tuple[str, Sequence[CandidateScore], bool]] = field(default_factory=list)
    lift: float = 1.1
    """By which alignment strengthens every block."""
    timed: int = 0
    lines: list[str] = field(default_factory=list)
    latency_ms: Callable[[Model], float] = lambda model: 10.0 * len(model.kept_blocks)
    publish: Callable[[], None] = lambda: None
    trials_end: Callable[[], None] = lambda: None
    """Called when final scores are told."""
    spoilt: Callable[[Model, str, int], bool] = lambda model, video, label: False
    """Whether a model finds no instance of a class in a video; what candidates find is not spoilt."""

    def sweep(self, task: SweepTask, feed: Feed) -> Mapping[str, Any]:
        self.tasks.append(task)
        part = getattr(self.split, task.subset)
        while (work := feed.take()) is not None:
            made = self.rows(replace(task, candidates=work.candidates), part.select(work.piece.videos))
            feed.give(work, made)
            self.slices.append((task.name, work.piece.index))
            self.forks += len(work.candidates) * len(work.piece.videos)
        return {"hosts": ["here"]}

    def rows(self, task: SweepTask, part: Annotations) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for video in part.videos:
            for candidate in (UNDROPPED, *task.candidates):
                good = 1.0 if self.perfect else quality(task.model, candidate)
                if task.criterion != "map":
                    rows.append(
                        {"video": video.id, "candidate": candidate, "value": 1 - good + candidate / 100}
                    )
                    continue
                for (start, end), label in zip(video.segments_seconds, video.labels, strict=True):
                    shift = (1 - good) * 20 * (start % 1)
                    if candidate == UNDROPPED and self.spoilt(task.model, video.id, int(label)):
                        shift = 1000.0
                    where = {"start": start + shift, "end": end + shift, "label": int(label)}
                    rows.append({"video": video.id, **where, "score": start % 1, "candidate": candidate})
        schema = DETECTION_SCHEMA if task.criterion == "map" else pa.schema([("video", pa.string())])
        if task.criterion != "map":
            schema = schema.append(pa.field("value", pa.float64()))
        return pa.Table.from_pylist(rows, schema=schema.append(pa.field("candidate", pa.int32())))

    def align(self, task: AlignTask) -> Alignment:
        self.aligned.append(task)
        weights = {
            name: value * np.float32(self.lift) if "blocks" in name else value
            for name, value in task.student.weights.items()
        }
        curves = pa.table({"learning_rate": [1e-4, 1e-4], "epoch": [1, 2], "loss": [0.5, 0.25 / task.round]})
        model = Model(task.student.kept_blocks, weights)
        return Alignment(1e-4, 2, model, curves, measured={"seconds_per_epoch": self.timed})

    def scored(self, task: SweepTask, scores: Sequence[CandidateScore], final: bool) -> None:
        self.told.append((task.name, scores, final))
        if final:
            self.trials_end()

    def latency(self, model: Model) -> Mapping[str, float]:
        self.timed += 1
        return {"p50_ms": self.latency_ms(model), "p95_ms": 99.0 + self.timed}

    def run(
        self, run_dir: str | Storage, teacher: Model | None = None, owner: Owner | None = None
    ) -> Summary:
        return compress(
            self.recipe,
            self.split,
            to_bundle(teacher or teacher_model(), {}),
            Steps(self.sweep, self.align, self.latency, self.scored),
            Ledger.open(run_dir, self.recipe, owner),
            to_bundle=to_bundle,
            from_bundle=from_bundle,
            cost=lambda model: Cost(
                macs=100 + 100 * len(model.kept_blocks),
                block_macs=100 * len(model.kept_blocks),
                params=len(model.weights),
            ),
            report=self.lines.append,
            publish=self.publish,
        )


@pytest.fixture(scope="session")
def make_world() -> Callable[..., World]:
    """World(...) with recipe changes given as `stopping__max_drops=1`-like keys under `recipe_`."""

    def make(changes: Mapping[str, Any] | None = None, **fields: Any) -> World:
        return World(**{"recipe": recipe(**(changes or {})), **fields})

    return make


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    return recipe


@pytest.fixture
def make_videos() -> Callable[..., Annotations]:
    return videos


@pytest.fixture
def mortal() -> Callable[..., MortalStorage]:
    def make(run_dir: str | Storage, lifetime: int | None = None) -> MortalStorage:
        return MortalStorage(Storage.at(run_dir) if isinstance(run_dir, str) else run_dir, lifetime)

    return make


@pytest.fixture
def killed() -> type[BaseException]:
    return Killed


@pytest.fixture
def first_model() -> Callable[[], Model]:
    return teacher_model
