"""A run as its report sees it: a teacher, a round that stands, one that was rolled back, one that stands."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.config import Recipe
from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations, Video
from pbd_ray.report.evidence import DepthEvidence, Evidence

CLASSES = ("<b>jump</b> & $run$", "sit", "never")
"""The first wants to be markup, of the last there is no instance."""
VIDEOS = 24


def videos() -> Annotations:
    rng = np.random.default_rng(7)
    made = []
    for index in range(VIDEOS):
        starts = np.sort(rng.uniform(0, 90, size=4))
        made.append(
            Video(
                id=f"video <{index}>",
                path="",
                subset="test",
                duration_seconds=120.0,
                fps=10.0,
                frames=1200,
                segments_seconds=np.stack([starts, starts + rng.uniform(2, 20, size=4)], axis=1),
                labels=np.array([0, 1, index % 2, 1], dtype=np.int32),
            )
        )
    return Annotations(CLASSES, tuple(made))


def detections(annotations: Annotations, shift: float, seed: int) -> pa.Table:
    """Every instance found, but not exactly; and some that are not there."""
    rng, rows = np.random.default_rng(seed), []
    for video in annotations.videos:
        for (start, end), label in zip(video.segments_seconds, video.labels, strict=True):
            for _ in range(3):
                moved = start + rng.normal(0, shift), end + rng.normal(0, shift) + 1.0
                rows.append((video.id, *moved, int(label), float(rng.uniform())))
        rows.append((video.id, 100.0, 110.0, 0, float(rng.uniform(0, 0.5))))
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(DETECTION_SCHEMA.names, columns, strict=True)), schema=DETECTION_SCHEMA)


def depth_entry(kept: list[int], quality: float) -> dict[str, Any]:
    return {
        "kept_blocks": kept,
        "map": {"0.3": quality + 0.1, "0.5": quality},
        "average_map": quality + 0.05,
        "headline_map": quality,
        "macs": 1_000_000_000 + 500_000_000 * len(kept),
        "block_macs": 500_000_000 * len(kept),
        "params": 100_000 * (1 + len(kept)),
        "latency_ms": 2.0 + 2 * len(kept),
        "seconds": {"evaluation": 3.0},
        "result": f"{len(kept)}" * 64,
    }


def round_entry(number: int, block: int, kept: list[int], quality: float, **changes: Any) -> dict[str, Any]:
    interval = {
        "difference": quality - 0.6,
        "low": quality - 0.65,
        "high": quality - 0.58,
        "confidence": 0.95,
        "videos": VIDEOS,
        "unreliable": False,
        "margin": 0.01,
        "verdict": "undecided",
        "dropped_classes": 0,
    }
    candidates = {
        str(one): {
            "score": 0.9 - one / 100 if one != block else 0.95,
            "average_map": 0.5,
            "train_loss": None,
            "videos": 5 if one == 0 else 10,
            "stopped": one == 0,
            "behind": None if one == block else 0.05 + one / 100,
            "behind_low": None if one == block else 0.01,
            "behind_high": None if one == block else 0.09 + one / 100,
        }
        for one in sorted([*kept, block])
    }
    return {
        "round": number,
        "dropped_block": block,
        "criterion": "map",
        "scores": {},
        "undropped_score": 0.96,
        "candidates": candidates,
        "tie": None,
        "near": [],
        "lr": 1e-4,
        "epoch": 2,
        "standing": True,
        "rolled_back": None,
        "undecided": False,
        **depth_entry(kept, quality),
        "interval": interval,
        "selection_interval": None,
        "guards": [],
        **changes,
    }


def curves() -> pa.Table:
    rows = [
        {"learning_rate": rate, "epoch": epoch, "total": 2.0 / (epoch + 1), "outcome": "finished"}
        | {"selection_map": None if epoch == 0 else 0.5 + epoch * rate}
        for rate in (1e-3, 1e-4)
        for epoch in range(3)
    ]
    return pa.Table.from_pylist(rows)


def measured(seconds: float) -> dict[str, Any]:
    runs = {"0.0001": {"epochs": 3, "seconds": 30.0}, "0.001": {"epochs": 3, "seconds": 30.0}}
    common = {"resumed": False, "cpus_per_worker": 0.5, "gpus_per_worker": 0.0, "train_workers": 1}
    return {
        "stages": {
            "scores": {"seconds": seconds, "workers": 2, **common},
            "align": {"seconds": 40.0, "learning_rates": runs, **common},
            "evaluation": {"seconds": 3.0, "workers": 2, **common},
        },
        "latency": {"p50_ms": 8.0, "p95_ms": 9.0},
    }


class ParsedPage(HTMLParser):
    """Elements with their attributes, texts, and whether every element is closed in order."""

    VOID = frozenset({"meta", "link", "br", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="session")
def parse() -> Callable[[str], ParsedPage]:
    """parse(html) -> its elements and texts; every element must be closed, in order."""
    return ParsedPage


@pytest.fixture(scope="session")
def evidence() -> Evidence:
    test = videos()
    few = {"videos": 12, "unreliable": True}
    worse = {"difference": -0.3, "low": -0.4, "high": -0.2, "margin": 0.02, "verdict": "inferior", **few}
    lost = {"what": "class_loss", "name": CLASSES[0], "limit": 0.1, "verdict": "undecided", **few}
    guards = [lost | {"difference": -0.08, "low": -0.15, "high": 0.01}]
    reason = "inferior on selection videos: mAP less the teacher's -0.3"
    changes = {"standing": False, "rolled_back": reason, "selection_interval": worse, "guards": guards}
    back = round_entry(2, 1, [0, 3], 0.3, **changes)
    first, last = round_entry(1, 2, [0, 1, 3], 0.61), round_entry(3, 3, [0, 1], 0.59)
    # The runner-up of the round that was rolled back: the same scores, so distances are from block 1.
    last["candidates"] = back["candidates"]
    recipe = {
        "name": "a <run>",
        "data": {},
        "detector": {"backbone": {"depth": 4}},
        "evaluation": {"tious": (0.3, 0.5), "bootstrap_replicates": 50},
    }
    environment = {
        "versions": {"torch": "2.9", "ray": "2.60"},
        "python": "3.11.7",
        "platform": "Linux",
        "cpu": "a processor",
        "device": "cpu",
        "threads_per_worker": 1,
        **{f"{name}_hash": name[0] * 64 for name in ("source", "data", "teacher")},
    }
    summary = {
        "teacher": depth_entry([0, 1, 2, 3], 0.6),
        "rounds": [first, back, last],
        "stop_reason": "dropped 2 of at most 2 blocks",
        "bit_exact": True,
        "quarantined": {"bad <i>": "bad.mp4: not a video & empty"},
    }
    rounds = [
        DepthEvidence(detections(test, shift, seed), curves(), measured(seconds))
        for seed, (shift, seconds) in enumerate(((1.0, 20.0), (3.0, 0.0), (1.2, 18.0)))
    ]
    return Evidence(
        location="/runs/a <run>",
        plan=None,
        recipe=Recipe.model_validate({"experiment": recipe, "execution": {"cpus_per_worker": 0.5}}),
        summary=summary,
        environment={"first": environment, "changes": []},
        test=test,
        counts={"fit": 10, "selection": 4, "test": VIDEOS},
        teacher=DepthEvidence(detections(test, 1.0, 9), None, {"stages": {}}),
        rounds=rounds,
    )


@pytest.fixture
def make_detections() -> Callable[[Annotations, float, int], pa.Table]:
    return detections
