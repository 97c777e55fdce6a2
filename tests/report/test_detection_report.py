"""From two files to metrics.json and detad.json: what is counted, what is refused, what is written."""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbd_ray.config import ConfigError, UserError
from pbd_ray.metrics.detad_rules import THUMOS14
from pbd_ray.report.detection_report import (
    Measures,
    detad_json,
    evaluate_files,
    metrics_json,
    summary_lines,
    tiou_key,
    tious_of,
    write_report,
)

MEASURES = Measures((0.3, 0.5), THUMOS14, replicates=50)
GROUND_TRUTH: dict[str, Any] = {
    "database": {
        "a": {
            "subset": "validation",
            "duration": 60.0,
            "annotations": [{"label": "jump", "segment": [0, 4]}, {"label": "sit", "segment": [10, 14]}],
        },
        "b": {
            "subset": "validation",
            "duration": 60.0,
            "annotations": [{"label": "jump", "segment": [5, 9]}],
        },
        "c": {"subset": "training", "duration": 60.0, "annotations": [{"label": "run", "segment": [5, 9]}]},
    }
}
PREDICTIONS: dict[str, Any] = {
    "results": {
        "a": [
            {"label": "jump", "segment": [0, 4], "score": 0.9},
            {"label": "sit", "segment": [10, 13], "score": 0.8},
        ],
        "b": [{"label": "jump", "segment": [7, 11], "score": 0.7}],
    }
}


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def write(ground_truth: Any = GROUND_TRUTH, predictions: Any = PREDICTIONS) -> tuple[Path, Path]:
        paths = tmp_path / "gt.json", tmp_path / "p.json"
        for path, value in zip(paths, (ground_truth, predictions), strict=True):
            path.write_text(value if isinstance(value, str) else json.dumps(value))
        return paths

    return write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3:0.7:0.1", [0.3, 0.4, 0.5, 0.6, 0.7]),
        ("0.5:0.95:0.05", [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]),
        ("0.5:0.5:0.1", [0.5]),
        ("0.5", [0.5]),
        ("0.5,0.75", [0.5, 0.75]),
    ],
)
def test_thresholds(text: str, expected: list[float]) -> None:
    assert tious_of(text) == pytest.approx(expected)
    assert len({tiou_key(tiou) for tiou in tious_of(text)}) == len(expected)


def test_a_range_is_spaced_as_the_official_evaluators_space_it() -> None:
    assert tious_of("0.3:0.7:0.1") == tuple(np.linspace(0.3, 0.7, 5).tolist())


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "0.5:0.7", "0.5,1.5", "0.5,0.5", "nan", "0:0.5:0.1"),
        *("0.7:0.5:0.1", "0.3:0.7:0.15", "0.3:0.7:0", "0.1:1:1e-9", "0.3:0.7:nan", "inf:inf:1"),
    ],
)
def test_wrong_thresholds(text: str) -> None:
    with pytest.raises(ConfigError, match="--tiou "):
        tious_of(text)


@pytest.mark.parametrize(
    ("tiou", "key"), [(0.3, "0.30"), (0.7 - 0.1 - 0.2, "0.40"), (1, "1.00"), (0.625, "0.625")]
)
def test_keys(tiou: float, key: str) -> None:
    assert tiou_key(tiou) == key


def test_the_numbers_by_hand(files: Callable[..., tuple[Path, Path]]) -> None:
    """jump in b overlaps by 2 of 6 seconds: found at 0.3, missed at 0.5."""
    report = evaluate_files(*files(), "validation", MEASURES)
    written = metrics_json(report)
    assert written["map"] == {"0.30": 1.0, "0.50": 0.75}
    assert written["average_map"] == 0.875
    assert written["ap_by_class"] == {"jump": {"0.30": 1.0, "0.50": 0.5}, "sit": {"0.30": 1.0, "0.50": 1.0}}
    assert written["classes_without_instances"] == ["run"]
    assert (written["videos"], written["instances"], written["detections"]) == (2, 3, 3)
    assert written["average_map_interval"]["low"] <= written["average_map_interval"]["high"]
    assert written["average_map_interval"]["unreliable"] is True
    analysis = detad_json(report.detad)
    assert analysis["tious"] == ["0.50"]
    assert analysis["num_ground_truth"] == 3
    assert analysis["error_counts_top10G"]["Localization Err"] == 1
    assert analysis["profile"]["10G"] is None
    assert "mAP@0.50 0.7500" in " ".join(summary_lines(report))


def test_no_interval(files: Callable[..., tuple[Path, Path]]) -> None:
    report = evaluate_files(*files(), "validation", Measures((0.5,), THUMOS14, replicates=0))
    assert metrics_json(report)["average_map_interval"] is None


def changed(value: Any, *path: Any, to: Any) -> Any:
    """A copy of `value` with what stands at `path` replaced."""
    made = copy.deepcopy(value)
    node = made
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    return made


JUMP = {"label": "jump", "segment": [30, 34], "score": 0.95}


def test_detections_of_other_videos_are_false_positives(
    files: Callable[..., tuple[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    """As in the official evaluators; `c` is in another subset, `d` in none."""
    predictions = changed(PREDICTIONS, "results", "c", to=[JUMP])
    predictions["results"]["d"] = [JUMP]
    with caplog.at_level(logging.WARNING):
        report = evaluate_files(*files(predictions=predictions), "validation", MEASURES)
    written = metrics_json(report)
    assert written["ap_by_class"]["jump"]["0.50"] == pytest.approx(0.5 / 3)
    assert written["detections_of_other_videos"] == 2
    assert report.detad.error_counts["Background Err"] == 2
    assert "2 detections of 2 videos outside subset 'validation' count as false positives" in caplog.text


def test_unknown_labels_are_left_out(
    files: Callable[..., tuple[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    predictions = changed(PREDICTIONS, "results", "b", 0, "label", to="fly")
    with caplog.at_level(logging.WARNING):
        written = metrics_json(evaluate_files(*files(predictions=predictions), "validation", MEASURES))
    assert written["detections_of_unknown_labels_left_out"] == 1
    assert "1 detections of unknown labels left out" in caplog.text


def test_duplicates_are_counted(
    files: Callable[..., tuple[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    twice = [{"label": "jump", "segment": [5, 9]}] * 2
    ground_truth = changed(GROUND_TRUTH, "database", "b", "annotations", to=twice)
    with caplog.at_level(logging.WARNING):
        report = evaluate_files(*files(ground_truth), "validation", MEASURES)
    assert metrics_json(report)["instances_left_out"] == 1
    assert report.detad.num_ground_truth == 4  # DETAD keeps them
    assert "mAP: 1 ground-truth instances left out: 0 without a duration, 1 within" in caplog.text


@pytest.mark.parametrize(
    ("ground_truth", "predictions", "subset", "message"),
    [
        (GROUND_TRUTH, PREDICTIONS, "testing", "no video of subset 'testing'; it holds 'training' (1), 'val"),
        ("{", PREDICTIONS, "validation", "gt.json: not JSON"),
        (GROUND_TRUTH, "[", "validation", "p.json: not JSON"),
        (GROUND_TRUTH, "[]", "validation", "p.json: expected an object"),
        (GROUND_TRUTH, {"result": {}}, "validation", "p.json: expected a member 'results'"),
        (
            GROUND_TRUTH,
            {"results": {"a": [{**JUMP, "label": "fly"}]}},
            "validation",
            "p.json: no detection has a label of",
        ),
        (GROUND_TRUTH, {"results": {"z": [JUMP]}}, "validation", "no detection is of a video of subset"),
        (
            changed(GROUND_TRUTH, "database", "c", "annotations", to=[]),
            PREDICTIONS,
            "training",
            "no detection is of a video of subset 'training'",
        ),
        (
            changed(GROUND_TRUTH, "database", "c", "annotations", to=[]),
            {"results": {}},
            "training",
            "ground truth has no instance",
        ),
    ],
)
def test_refused(
    files: Callable[..., tuple[Path, Path]],
    ground_truth: Any,
    predictions: Any,
    subset: str,
    message: str,
) -> None:
    with pytest.raises(UserError) as caught:
        evaluate_files(*files(ground_truth, predictions), subset, MEASURES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_written_whole(files: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    report = evaluate_files(*files(), "validation", MEASURES)
    folder = tmp_path / "new" / "out"
    names = write_report(report, folder, {"predictions.json": b"{}"})
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    assert json.loads((folder / "metrics.json").read_text()) == metrics_json(report)
    assert json.loads((folder / "detad.json").read_text()) == detad_json(report.detad)
    assert sum((folder / name).read_bytes().startswith(b"\x89PNG") for name in names) == 4


ODD = [None, True, -1, 0, 1e308, -1e308, 1e-300, 10**400, float("nan"), float("inf")]
ODD += ["", "x", "jump", "a\nb", "\ud800", [], {}, [1], [2, 1], [1, 1], [0, 1e9], {"segment": [1, 2]}]


def spoiled(value: Any, draw: random.Random) -> Any:
    """A copy with one to three places replaced, removed or doubled."""
    made = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        node, parent, key = made, None, None
        while isinstance(node, dict | list) and node and (parent is None or draw.random() < 0.8):
            parent, key = node, draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = parent[key]
        if parent is None:
            continue
        action = draw.random()
        if action < 0.15:
            del parent[key]
        elif action < 0.3 and isinstance(parent, list):
            parent.append(copy.deepcopy(node))
        else:
            parent[key] = copy.deepcopy(draw.choice(ODD))
    return made


@pytest.mark.parametrize("seed", range(3))
def test_a_spoiled_file_gives_numbers_or_one_line(files: Callable[..., tuple[Path, Path]], seed: int) -> None:
    draw = random.Random(seed)
    outcomes = set()
    for _ in range(60):
        ground_truth, predictions = GROUND_TRUTH, PREDICTIONS
        if draw.random() < 0.5:
            ground_truth = spoiled(ground_truth, draw)
        else:
            predictions = spoiled(predictions, draw)
        texts = [json.dumps(value) for value in (ground_truth, predictions)]
        if draw.random() < 0.1:
            texts[draw.randrange(2)] = texts[0][: draw.randrange(len(texts[0]))]
        outcomes.add(outcome_of(*files(*texts)))
    assert outcomes == {"numbers", "one line"}


def outcome_of(*paths: Path) -> str:
    try:
        report = evaluate_files(*paths, "validation", Measures((0.5,), THUMOS14, replicates=10))
    except UserError as error:
        return "one line" if str(error).isprintable() else f"not printable: {error!r}"
    json.dumps([metrics_json(report), detad_json(report.detad)], allow_nan=False)
    return "numbers"
