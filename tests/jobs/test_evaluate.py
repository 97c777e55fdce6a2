"""jobs/evaluate.py in both forms, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = {"precision_recall.png", "false_positives.png", "false_negatives.png", "sensitivity.png"}
FILES = {"metrics.json", "detad.json", *FIGURES}


def agrees(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(agrees(ours[key], theirs[key]) for key in theirs)
    return bool(abs(ours - theirs) <= 1e-9)


@pytest.mark.golden
def test_a_published_detector_as_a_process_of_its_own(shared: Path, tmp_path: Path) -> None:
    """The numbers are the official evaluator's and the original DETAD's; no model is imported."""
    folder = shared / "data" / "thumos14"
    expected = json.loads((folder / "expected.json").read_text())
    command = [
        *(sys.executable, "-X", "importtime", str(ROOT / "jobs" / "evaluate.py")),
        *("--ground-truth", str(folder / "a2net_ground_truth.json")),
        *("--predictions", str(folder / "a2net_predictions.json")),
        *("--subset", "validation", "--output", str(tmp_path / "out")),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    ended = os.times()
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "pbd_ray.metrics.detad" in imported
    assert not imported & {"torch", "ray"}
    # Five seconds are promised on a machine that does nothing else; processor time does not feel the others.
    assert ended.children_user - began.children_user < 10
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert agrees(metrics["map"], expected["activitynet_thumos"]["map"])
    assert agrees(metrics["average_map"], expected["activitynet_thumos"]["average_map"])
    analysis = json.loads((tmp_path / "out" / "detad.json").read_text())
    for key in set(expected) - {"activitynet_thumos", "activitynet_anet"}:
        assert agrees(analysis[key], expected[key]), key


@pytest.mark.golden
def test_other_thresholds_and_rules(shared: Path, tmp_path: Path, run_job: Callable[..., Any]) -> None:
    folder = shared / "data" / "thumos14"
    expected = json.loads((folder / "expected.json").read_text())["activitynet_anet"]
    arguments = ["--ground-truth", str(folder / "a2net_ground_truth.json"), "--replicates=0"]
    arguments += ["--predictions", str(folder / "a2net_predictions.json"), "--subset=validation"]
    arguments += ["--tiou=0.5:0.95:0.05", "--detad=activitynet", f"--output={tmp_path}"]
    outcome = run_job("evaluate.py", *arguments)
    assert outcome.status == 0, outcome.err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert agrees(metrics["map"], expected["map"])
    assert json.loads((tmp_path / "detad.json").read_text())["tious"] == list(expected["map"])


def test_a_bundle_and_then_its_detections(
    tiny_recipe: str,
    bundle: Path,
    videos: Path,
    video_cache: Path,
    tmp_path: Path,
    run_job: Callable[..., Any],
) -> None:
    """The second form writes the detections; the first form gives the same numbers for them."""
    recipe = [tiny_recipe, "backend=local", f"cache_dir={video_cache}"]
    first = run_job("evaluate.py", "--bundle", str(bundle), *recipe, "--output", str(tmp_path / "one"))
    assert first.status == 0, first.err
    assert "video 1 of 4, test_000" in first.out
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"predictions.json", *FILES}
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert list(metrics["map"]) == ["0.30", "0.40", "0.50", "0.60", "0.70"]
    assert (metrics["videos"], metrics["kept_blocks"]) == (4, [0, 1, 3])
    assert metrics["detections"] > 0
    files = ["--ground-truth", str(videos / "annotations.json")]
    files += ["--predictions", str(tmp_path / "one" / "predictions.json"), "--subset", "test"]
    second = run_job("evaluate.py", *files, "--output", str(tmp_path / "two"))
    assert second.status == 0, second.err
    again = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert agrees(again["map"], metrics["map"])
    one, two = (json.loads((tmp_path / name / "detad.json").read_text()) for name in ("one", "two"))
    assert agrees(one["gain"], two["gain"]) and agrees(one["sensitivity"], two["sensitivity"])


def test_only_the_test_videos_need_be_there_and_not_all_of_them(
    tiny_recipe: str, bundle: Path, videos: Path, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    data = tmp_path / "videos"
    data.mkdir()
    for path in (videos / "annotations.json", *videos.glob("test_*.mp4")):
        shutil.copy(path, data)
    (data / "test_0002.mp4").write_bytes(b"")
    own = ["experiment.data.source=files", "experiment.data.synthetic=null", f"data_root={data}"]
    own += [f"annotations={data / 'annotations.json'}", "backend=local", "cache_gigabytes=0"]
    own.append("experiment.data.max_quarantined=0.25")
    arguments = ["--bundle", str(bundle), "--tiou", "0.5", tiny_recipe, *own]
    outcome = run_job("evaluate.py", *arguments, "--output", str(tmp_path / "out"))
    assert outcome.status == 0, outcome.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["map"]) == ["0.50"]
    assert metrics["quarantined"] == {
        "test_0002": f"{data / 'test_0002.mp4'}: the video file is empty (0 bytes)"
    }
    assert metrics["videos"] == 3


FIRST = ["--ground-truth", "{gt}", "--predictions", "{gt}", "--subset", "test"]
SECOND = ["--bundle", "{bundle}", "{recipe}", "backend=local", "cache_dir={cache}"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give --ground-truth, --predictions and --subset, or --bundle DIR and a RECIPE"),
        (FIRST[:4], "give --ground-truth, --predictions and --subset, or"),
        (["demo"], "give --ground-truth, --predictions and --subset, or"),
        (["--bundle", "{bundle}"], "--bundle goes with a RECIPE"),
        ([*SECOND, "--subset", "test"], "--bundle goes with a RECIPE"),
        ([*FIRST, "--tiou", "0.7:0.3:0.1"], "--tiou '0.7:0.3:0.1'"),
        ([*FIRST, "--detad", "thumos"], "DETAD rules 'thumos' are neither a file nor one of"),
        ([*FIRST, "--replicates=-1"], "--replicates -1 is below 0"),
        ([*FIRST, "--output", "{gt}"], "annotations.json is not a directory"),
        (["--ground-truth", "no.json", *FIRST[2:]], "no.json: cannot be read: No such file"),
        (FIRST, "annotations.json: expected a member 'results'"),
        ([*FIRST[:4], "--subset", "none"], "no video of subset 'none'"),
        (["--bundle", "nowhere", *SECOND[2:]], "nowhere: no such bundle directory"),
        (["--bundle", "{bundle}", "nosuch"], "recipe 'nosuch' is neither"),
        ([*SECOND, "sed=1"], "unknown key 'experiment.sed'"),
        ([*SECOND, "detector.grid.overlap=0.25"], "grid.overlap is 0.5, experiment.detector.grid.overlap"),
        ([*SECOND, "data.test_subset=none"], "no test videos: data.fit_subset 'fit'"),
    ],
)
def test_refused(
    arguments: list[str],
    expected: str,
    tiny_recipe: str,
    bundle: Path,
    videos: Path,
    video_cache: Path,
    tmp_path: Path,
    run_job: Callable[..., Any],
) -> None:
    """One line, status 2, nothing written."""
    values = {
        "gt": videos / "annotations.json",
        "bundle": bundle,
        "recipe": tiny_recipe,
        "cache": video_cache,
    }
    given = [argument.format(**values) for argument in arguments]
    output = [] if "--output" in given else ["--output", str(tmp_path / "out")]
    outcome = run_job("evaluate.py", *given, *output)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert expected in outcome.err
    assert not (tmp_path / "out").exists()


def test_markup_in_ids_and_labels(tmp_path: Path, run_job: Callable[..., Any]) -> None:
    """Neither a browser's nor matplotlib's: it all comes out as it went in."""
    labels, ids = ["<script>alert('1')</script>&amp;$x_{$", "b$\\frac{"], ["<b>v0", "&v1"]
    instances = [{"label": label, "segment": [10.0 * k, 10.0 * k + 4]} for k, label in enumerate(labels)]
    database = {id_: {"subset": "<i>", "duration": 30.0, "annotations": instances} for id_ in ids}
    found = [{**instance, "score": 0.5} for instance in instances]
    truth, predictions = tmp_path / "gt.json", tmp_path / "p.json"
    truth.write_text(json.dumps({"database": database}))
    predictions.write_text(json.dumps({"results": dict.fromkeys(ids, found)}))
    arguments = ["--ground-truth", str(truth), "--predictions", str(predictions), "--subset", "<i>"]
    outcome = run_job("evaluate.py", *arguments, "--output", str(tmp_path / "out"))
    assert outcome.status == 0, outcome.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["average_map"] == 1.0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert labels[0] in metrics["ap_by_class"]
