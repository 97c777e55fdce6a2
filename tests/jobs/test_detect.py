"""jobs/detect.py: the same detections as evaluation gives, on videos that nobody annotated."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.image
import pyarrow as pa
import pytest
import torch

from pbd_ray.cluster.detect import detection_recipe
from pbd_ray.compression.scoring import ScoringJob, detect_video, score_videos
from pbd_ray.config import load_recipe
from pbd_ray.data.annotations import AGNOSTIC_CLASSES, Video, detections_to_json, load_annotations
from pbd_ray.data.source import VideoSource
from pbd_ray.data.unannotated import find_videos
from pbd_ray.data.video import VideoError
from pbd_ray.detector.bundle import load_bundle, save_bundle
from pbd_ray.detector.detector import Detector
from pbd_ray.search import in_process

RunJob = Callable[..., Any]
TEACHER = str(resources.files("pbd_ray") / "demo_teacher")


def results(path: Path) -> Any:
    return json.loads(path.read_text())["results"]


def test_the_detections_of_an_evaluation(
    tiny_recipe: str, bundle: Path, videos: Path, video_cache: Path, tmp_path: Path, run_job: RunJob
) -> None:
    """Without recipe and annotations, as `jobs/evaluate.py --bundle` with both."""
    recipe = [tiny_recipe, "backend=local", f"cache_dir={video_cache}"]
    assert (
        run_job("evaluate.py", "--bundle", str(bundle), *recipe, "--output", str(tmp_path / "a")).status == 0
    )
    files = [str(videos / f"test_000{number}.mp4") for number in (2, 0, 1, 3)]
    output = tmp_path / "b"
    outcome = run_job("detect.py", "--bundle", str(bundle), *files, "backend=local", "--output", str(output))
    assert outcome.status == 0, outcome.err
    found = results(output / "detections.json")
    assert found == results(tmp_path / "a" / "predictions.json")
    assert list(found) == ["test_0002", "test_0000", "test_0001", "test_0003"]
    assert {path.name for path in output.iterdir()} == {
        "detections.json", "detections.csv", *(f"{id_}.png" for id_ in found)
    }  # fmt: skip
    with (output / "detections.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    again: dict[str, list[Any]] = {id_: [] for id_ in found}
    for row in rows:
        segment = [float(row["start_seconds"]), float(row["end_seconds"])]
        again[row["video"]].append({"label": row["label"], "segment": segment, "score": float(row["score"])})
        assert row["file"] == str(videos / f"{row['video']}.mp4")
    assert again == found


def test_two_bundles_and_a_file_that_is_no_video(
    bundle: Path, videos: Path, tmp_path: Path, run_job: RunJob
) -> None:
    """The shipped teacher on videos shorter than its window, beside a detector of another architecture."""
    folder, output = tmp_path / "in", tmp_path / "out"
    (folder / "z").mkdir(parents=True)
    shutil.copy(videos / "test_0000.mp4", folder)
    shutil.copy(videos / "test_0001.mp4", folder / "z" / "test_0000.mp4")
    (folder / "bad.mkv").write_text("no video")
    arguments = ["--bundle", TEACHER, "--beside", str(bundle), str(folder), "--min-score", "0.1"]
    outcome = run_job(
        "detect.py", *arguments, "--output", str(output), "backend=local", "progress_seconds=0.001"
    )
    assert outcome.status == 1
    reason = f"{folder / 'bad.mkv'}: not a video, or without a video stream"
    assert f"failed: bad: {reason}" in outcome.out
    annotated = {video.id: video for video in load_annotations(videos / "annotations.json").videos}
    originals = {"test_0000": "test_0000", "test_0000-2": "test_0001"}
    for name, directory in (("detections", TEACHER), ("detections_beside", str(bundle))):
        loaded = load_bundle(directory)
        found = results(output / f"{name}.json")
        assert list(found) == list(originals)
        for id_, original in originals.items():
            table = detect_video(
                loaded.detector, annotated[original], VideoSource(str(videos)), 4, torch.device("cpu")
            )
            assert found[id_] == detections_to_json(table, loaded.classes)["results"][original]
    for id_, original in originals.items():
        seconds = annotated[original].duration_seconds
        lines = re.findall(rf" {id_}: (\d+) of {seconds:.0f} s\n", outcome.out)
        assert len(lines) >= 2 and int(lines[-1]) == pytest.approx(seconds, abs=1)
        assert matplotlib.image.imread(output / f"{id_}.png").shape[1] == 1330


def test_a_video_that_ends_in_the_middle(
    bundle: Path, videos: Path, tmp_path: Path, run_job: RunJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the look before did not see: the others are done, and with no other nothing is written."""

    def scored(job: ScoringJob, student: Detector, teacher: Any, wanted: Sequence[Video]) -> pa.Table:
        if wanted[0].id == "test_0001":
            raise VideoError("test_0001.mp4: its frames cannot be decoded")
        return score_videos(job, student, teacher, wanted)

    monkeypatch.setattr(in_process, "score_videos", scored)
    good, bad = (str(videos / f"test_000{number}.mp4") for number in (0, 1))
    for files, status, names in (
        ([bad, good], 1, {"detections.json", "detections.csv", "test_0000.png"}),
        ([bad], 2, None),
    ):
        output = tmp_path / str(status)
        outcome = run_job(
            "detect.py", "--bundle", str(bundle), *files, "backend=local", "--output", str(output)
        )
        assert outcome.status == status
        assert "test_0001.mp4: its frames cannot be decoded" in outcome.out + outcome.err
        assert names == ({path.name for path in output.iterdir()} if output.exists() else None)


def test_actions_without_names(tiny_recipe: str, videos: Path, tmp_path: Path, run_job: RunJob) -> None:
    """A class-agnostic bundle; one video needs no Ray, and is said to be in this process by no key."""
    config = load_recipe(tiny_recipe, ["detector.grid.kind=resize"]).experiment.detector
    save_bundle(tmp_path / "bundle", Detector(config, 1), AGNOSTIC_CLASSES, {})
    arguments = ["--bundle", str(tmp_path / "bundle"), str(videos / "test_0000.mp4")]
    outcome = run_job("detect.py", *arguments, "--output", str(tmp_path / "out"))
    assert outcome.status == 0, outcome.err
    (found,) = results(tmp_path / "out" / "detections.json").values()
    assert {item["label"] for item in found} == {"action"}


def test_where_it_runs_and_how(bundle: Path, videos: Path) -> None:
    """One video in this process, several on Ray, unless somebody says otherwise; nothing is read twice."""
    loaded = load_bundle(bundle)
    one, two = (
        find_videos([str(videos / f"test_000{k}.mp4") for k in range(count)]) for count in (1, 2)
    )  # fmt: skip
    given = ["backend=ray", "execution.max_workers=3", "autocast=bfloat16"]
    recipes = [detection_recipe(loaded, found, more) for found, more in ((one, ()), (two, ()), (one, given))]
    assert [recipe.execution.backend for recipe in recipes] == ["local", "ray", "ray"]
    assert {recipe.execution.cache_gigabytes for recipe in recipes} == {0}
    assert {recipe.execution.data_root for recipe in recipes} == {str(videos)}
    assert [recipe.experiment.autocast for recipe in recipes] == ["none", "none", "bfloat16"]
    assert recipes[2].execution.max_workers == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.mp4"], "none.mp4: no such video file or folder"),
        (["{empty}"], "empty: no video in this folder"),
        (["{bad}"], "1 of 1 test videos (100.0%) cannot be used: none is left; the first is "),
        (["{good}", "max_wokers=3"], "'max_wokers=3': no such video, and no value of execution"),
        (["{good}", "experiment.seed=3"], "'experiment.seed=3': no such video, and no value of execution"),
        (["{good}", "data_root=/"], "'data_root=/': no such video, and no value of execution"),
        (["{good}", "device=tpu"], "execution.device: Input should be 'cpu' or 'cuda', got 'tpu'"),
        (["{good}", "device=cuda"], "execution.device is cuda but execution.gpus_per_worker is 0"),
        (["{good}", "--min-score", "1.5"], "--min-score 1.5 is not between 0 and 1"),
        (["{good}", "--min-score", "nan"], "--min-score nan is not between 0 and 1"),
        (["{good}", "--beside", "{empty}"], "empty: config.json is missing"),
        (["{good}", "--beside", "{agnostic}"], "agnostic: classes ['action'], --bundle has ['fall', "),
        (["{good}", "--output", "{bad}"], "bad.mp4 is not a directory"),
    ],
)
def test_refused(
    arguments: list[str],
    expected: str,
    tiny_recipe: str,
    bundle: Path,
    videos: Path,
    tmp_path: Path,
    run_job: RunJob,
) -> None:
    """One line, status 2, nothing written."""
    config = load_recipe(tiny_recipe).experiment.detector
    save_bundle(tmp_path / "agnostic", Detector(config, 1), AGNOSTIC_CLASSES, {})
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.mp4").write_text("no video")
    places = {name: tmp_path / name for name in ("agnostic", "empty")}
    places |= {"good": videos / "test_0000.mp4", "bad": tmp_path / "bad.mp4"}
    given = [argument.format(**places) for argument in arguments]
    output = [] if "--output" in given else ["--output", str(tmp_path / "out")]
    outcome = run_job("detect.py", "--bundle", str(bundle), *given, *output)
    assert outcome.status == 2
    line = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1 and expected in line[0] and "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()
