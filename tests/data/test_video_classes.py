"""Class-agnostic detections named by a video classifier, from the recipe to mAP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.candidates import SweepRows, candidate_scores
from pbd_ray.config import ConfigError, Recipe, UserError, load_recipe
from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations, load_annotations
from pbd_ray.data.json_file import AnnotationError
from pbd_ray.data.source import load_split
from pbd_ray.data.video_classes import VideoClasses, named, read_probabilities, scored_against
from pbd_ray.metrics.mean_ap import mean_average_precision
from pbd_ray.search.evaluation import evaluate
from pbd_ray.search.hashing import annotations_hash
from pbd_ray.search.state import Cost, Model

CLASSES = ("dive", "jump", "run")
VIDEOS = {  # video -> subset, label of its two instances
    "a": ("training", "dive"),
    "b": ("training", "run"),
    "c": ("training", "jump"),
    "d": ("validation", "dive"),
    "e": ("validation", "jump"),
}
Write = Callable[..., Recipe]


def annotations_json() -> dict[str, Any]:
    database = {}
    for id_, (subset, label) in VIDEOS.items():
        segments = ([1, 3], [5, 9])
        instances = [{"label": label, "segment": segment} for segment in segments]
        database[id_] = {"subset": subset, "duration": 10.0, "fps": 30, "annotations": instances}
    return {"database": database}


def classifier_json(videos: str = "abcde") -> dict[str, Any]:
    """Its classes in an order of its own and one that is not annotated; right for every video but d."""
    names = ["run", "swim", "jump", "dive"]
    results = {}
    for id_ in videos:
        right = "jump" if id_ == "d" else VIDEOS[id_][1]
        results[f"v_{id_}" if id_ == "b" else id_] = [0.6 if name == right else 0.1 for name in names]
    return {"class": names, "results": results}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def recipe(classifier: dict[str, Any] | None, *overrides: str) -> Recipe:
        (tmp_path / "annotations.json").write_text(json.dumps(annotations_json()))
        values = [f"annotations={tmp_path / 'annotations.json'}", "data.selection_fraction=0.3", *overrides]
        if classifier is not None:
            (tmp_path / "classifier.json").write_text(json.dumps(classifier))
            values.append(f"external_classifier={tmp_path / 'classifier.json'}")
        return load_recipe("activitynet_videomae_s", values)

    return recipe


def detections(videos: str, candidate: int | None = None) -> pa.Table:
    """Two right segments and a wrong one in every video, class-agnostic."""
    rows = [
        (id_, start, end, 0, score)
        for id_ in videos
        for start, end, score in ((1, 3, 0.9), (5, 9, 0.8), (9, 10, 0.7))
    ]
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=DETECTION_SCHEMA)
    if candidate is None:
        return table
    return table.append_column("candidate", pa.array([candidate] * len(rows), pa.int32()))


def test_every_detection_stands_for_the_top_classes_of_its_video() -> None:
    probabilities = {"a": np.array([0.1, 0.6, 0.3]), "b": np.array([0.2, 0.2, 0.6])}
    published = Annotations(CLASSES, ())
    table = pa.table(
        [["a", "b", "a"], [0.0, 1.0, 2.0], [4.0, 5.0, 6.0], [0, 0, 0], [0.5, 0.4, 0.2]],
        schema=DETECTION_SCHEMA,
    )
    found = VideoClasses(published, probabilities, 2).name(table)
    assert found.schema.equals(DETECTION_SCHEMA)
    rows = [(r["video"], r["start"], r["end"], r["label"], round(r["score"], 12)) for r in found.to_pylist()]
    assert rows == [
        ("a", 0.0, 4.0, 1, 0.3),
        ("a", 0.0, 4.0, 2, 0.15),
        ("b", 1.0, 5.0, 2, 0.24),
        ("b", 1.0, 5.0, 0, 0.08),  # of equal probabilities the lower class
        ("a", 2.0, 6.0, 1, 0.12),
        ("a", 2.0, 6.0, 2, 0.06),
    ]
    assert VideoClasses(published, probabilities, 9).name(table).num_rows == 9
    assert VideoClasses(published, {}, 2).name(DETECTION_SCHEMA.empty_table()).num_rows == 0


def test_map_is_of_the_published_classes(write: Write, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = write(classifier_json())
    split = load_split(recipe, said.append)
    assert said == []
    assert split.test.classes == ("action",)  # what the detector is trained on
    truth = scored_against(split.test)
    assert truth.classes == CLASSES and [video.id for video in truth.videos] == ["d", "e"]

    # By hand: probability times score, top two classes; d is taken for a jump, so dives are not found.
    everything = load_annotations(tmp_path / "annotations.json")
    by_hand = [
        (row["video"], row["start"], row["end"], CLASSES.index(label), row["score"] * p)
        for row in detections("de").to_pylist()
        for label, p in (("jump", 0.6), ("dive", 0.1))
    ]
    table = pa.table([list(column) for column in zip(*by_hand, strict=True)], schema=DETECTION_SCHEMA)
    rules = recipe.experiment.evaluation
    expected = mean_average_precision(
        everything.subset("validation").ground_truth(), table, rules.tious, len(CLASSES)
    )
    cost, model = Cost(macs=1, block_macs=1, params=1), Model((0,), {})
    quality = evaluate(split.test, detections("de"), None, rules, 0, model, cost)
    assert quality.map == pytest.approx(expected.map)
    assert 0.3 < quality.average_map < 0.9

    agnostic = evaluate(
        load_split(write(None), said.append).test, detections("de"), None, rules, 0, model, cost
    )
    assert agnostic.average_map > quality.average_map
    assert said == [
        "external_classifier is not set: detections stay without a class, and every mAP is class-agnostic AP"
    ]


def test_candidates_are_scored_by_named_classes(write: Write) -> None:
    recipe = write(classifier_json())
    fit = load_split(recipe, print).fit
    ids = "".join(video.id for video in fit.videos)
    table = pa.concat_tables([detections(ids, UNDROPPED), detections(ids[:1], 3)])
    sweep = SweepRows("map", table, dict.fromkeys((3, UNDROPPED), tuple(ids)))
    scores = candidate_scores(sweep, recipe.experiment, fit)
    # Every fit video is of a class of its own: with one of two found, half of the classes are.
    assert [score.block for score in scores] == [UNDROPPED, 3]
    assert scores[0].score == pytest.approx(1.0)
    assert scores[1].score == pytest.approx(0.5)


def test_training_videos_may_be_missing_and_test_videos_may_not(write: Write) -> None:
    said: list[str] = []
    split = load_split(write(classifier_json("de")), said.append)
    assert split.fit.video_classes is None and split.selection.video_classes is None
    assert split.test.video_classes is not None
    assert len(said) == 2
    assert "lacks 2 of 2 fit videos" in said[0] and "class-agnostic AP scores them" in said[0]
    assert "lacks 1 of 1 selection videos" in said[1]
    assert named(split.fit, detections("a")) == detections("a")
    with pytest.raises(
        AnnotationError, match=r"classifier\.json: results: lacks 1 of 2 test videos, 'd' first"
    ):
        load_split(write(classifier_json("abce")), print)


def test_what_a_classifier_says_is_data_of_the_run(write: Write) -> None:
    def hashed(content: dict[str, Any] | None) -> str:
        return annotations_hash(load_split(write(content), print).test)

    other = classifier_json()
    other["results"]["e"][0] = 0.2
    assert len({hashed(None), hashed(classifier_json()), hashed(other)}) == 3


def change(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**content, key: value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object, got []"),
        ({"results": {}}, "expected a member 'class'"),
        (
            change(classifier_json(), "class", ["run", "run", "jump", "dive"]),
            ".class|class: expected distinct",
        ),
        (change(classifier_json(), "class", ["run", "swim", "jump"]), "class: has no 'dive' (1 of 3 classes"),
        (change(classifier_json(), "results", {"a": [0.1]}), "results.a"),
        (change(classifier_json(), "results", {"a": [0.1, 0.2, "x", 0.1]}), "expected a number, got 'x'"),
        (
            change(classifier_json(), "results", {"a": [0.1, 0.2, float("nan"), 0.1]}),
            "expected a finite number",
        ),
    ],
)
def test_files_that_are_no_classifiers(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "classifier.json"
    path.write_text(json.dumps(content))
    with pytest.raises(AnnotationError) as caught:
        read_probabilities(path, CLASSES, ["a"])
    assert any(part in str(caught.value) for part in message.split("|"))
    assert str(path) in str(caught.value)


def test_a_classifier_needs_a_class_agnostic_detector() -> None:
    recipe = load_recipe("thumos14_videomae_s", ["external_classifier=x.json", "annotations=y.json"])
    with pytest.raises(ConfigError, match=r"external_classifier is set but data\.class_agnostic is false"):
        load_split(recipe, print)


def test_a_missing_file_is_one_line(write: Write, tmp_path: Path) -> None:
    recipe = write(None, f"external_classifier={tmp_path / 'nosuch.json'}")
    with pytest.raises(UserError, match=r"nosuch\.json: cannot be read"):
        load_split(recipe, print)
