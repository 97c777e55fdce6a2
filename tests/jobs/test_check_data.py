"""jobs/check_data.py on real video and on a folder in which much is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.cluster.preflight import usable_videos
from pbd_ray.config import load_recipe
from pbd_ray.data.annotations import load_annotations
from pbd_ray.data.quarantine import NOTHING
from pbd_ray.data.source import load_split

RunJob = Callable[..., Any]
WRITTEN = {"annotations.json", "problems.txt", "recipe.yaml", "statistics.json", "statistics.png"}


def test_real_video(shared: Path, tmp_path: Path, run_job: RunJob) -> None:
    """The index says what the annotations say; the recipe finds all of it."""
    folder, output = shared / "data" / "arid_composed", tmp_path / "out"
    given = ["--videos", str(folder / "videos"), "--annotations", str(folder / "annotations.json")]
    outcome = run_job("check_data.py", *given, "--output", str(output))
    assert outcome.status == 0, outcome.err
    assert {path.name for path in output.iterdir()} == WRITTEN
    assert "] 0 problems\n" in outcome.out and (output / "problems.txt").read_text() == ""
    theirs, ours = (load_annotations(path / "annotations.json") for path in (folder, output))
    assert ours.classes == theirs.classes
    assert ours.ground_truth().sort_by([("video", "ascending"), ("start", "ascending")]) == (
        theirs.ground_truth().sort_by([("video", "ascending"), ("start", "ascending")])
    )
    by_id = {video.id: video for video in theirs.videos}
    for video in ours.videos:
        annotated = by_id[video.id]
        assert (video.frames, video.subset) == (annotated.frames, annotated.subset)
        assert video.duration_seconds == pytest.approx(annotated.duration_seconds, abs=1e-3)
    assert json.loads((output / "statistics.json").read_text())["parts"]["training"]["instances"] == 239
    split = load_split(load_recipe(str(output / "recipe.yaml")), print)
    assert [len(part.videos) for part in split.parts.values()] == [33, 8, 10]


@pytest.fixture
def own(videos: Path, tmp_path: Path) -> Path:
    """Videos of at least 5 s at two depths, one damaged, and one that ROWS does not name."""
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for place, source in (("a.mp4", "fit_0000"), ("deep/b.mp4", "fit_0001"), ("c.mp4", "fit_0002")):
        shutil.copy(videos / f"{source}.mp4", folder / place)
    for place, source in (("d.mp4", "test_0000"), ("more.mp4", "test_0001")):
        shutil.copy(videos / f"{source}.mp4", folder / place)
    (folder / "bad.mp4").write_text("no video")
    return folder


ROWS = """video,label,start,end,subset
a,Run,0,1,train
a,Run,0.5,2,train
a,Sit,3,3,train
b.mp4,Run,x,1,train
b.mp4,Run,1,2,train
c,Run,4,99,train
bad,Run,0,1,train
gone,Run,0,1,train
d,Run,0,1,test
d,Sit,2,3,test
"""


def test_much_is_wrong(own: Path, tmp_path: Path, run_job: RunJob) -> None:
    """What can be used is used, each problem is a line, and the recipe's own checks find no more of them."""
    table, output = tmp_path / "own.csv", tmp_path / "out"
    table.write_text(ROWS)
    given = ["--videos", str(own), "--annotations", str(table), "--output", str(output), "--small"]
    outcome = run_job("check_data.py", *given)
    assert outcome.status == 0, outcome.err
    seconds = load_annotations(output / "annotations.json").select(["c"]).videos[0].duration_seconds
    lines = [
        f"{table}: line 5, [start, end][0]: expected a number, got 'x'",
        f"{table}: line 3, [start, end]: overlaps another 'Run' that ends at 1, kept, got [0.5, 2.0]",
        f"{table}: line 4, [start, end]: zero length, left out, got [3.0, 3.0]",
        f"{own}/bad.mp4: not a video, or without a video stream; the file may be damaged or incomplete",
        f"{table}: line 7, [start, end]: reaches out of the video of {seconds:g} s, cut, got [4.0, 99.0]",
        f"{own}: no file for video 'gone': tried gone.mp4 and [v_]gone{{.mp4,.mkv,.avi,.webm}}",
        f"{table}: label 'Sit': one instance only",
        f"{table}: label 'Sit': no instance in training",
        f"{own}: 1 video files that no annotation names, the first is 'more.mp4'",
    ]
    assert (output / "problems.txt").read_text().splitlines() == lines
    assert "9 problems: cannot be read 1, overlap 1, zero length 1, video cannot be used 2, " in outcome.out
    for line in lines:
        assert f"\n  {line}\n" in outcome.out
    recipe = load_recipe(str(output / "recipe.yaml"), ["backend=local"])
    split = load_split(recipe, print)
    assert usable_videos(recipe, split)[2] == NOTHING
    assert sorted(video.id for video in split.everything().videos) == ["a", "b", "c", "d"]


def test_the_recipe_runs(own: Path, tmp_path: Path, run_job: RunJob) -> None:
    """A teacher fitted by the recipe as it is, but for the number of epochs."""
    table, output = tmp_path / "own.csv", tmp_path / "out"
    table.write_text(ROWS)
    given = ["--videos", str(own), "--annotations", str(table), "--output", str(output), "--small"]
    assert run_job("check_data.py", *given).status == 0
    short = ["teacher.optimizer.epochs=1", "teacher.select_every_epochs=1", "backend=local"]
    outcome = run_job(
        "train_teacher.py", str(output / "recipe.yaml"), "--output", str(tmp_path / "teacher"), *short
    )
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "teacher" / "model.safetensors").is_file()


def test_nothing_of_the_user_is_replaced(own: Path, tmp_path: Path, run_job: RunJob) -> None:
    """An edited recipe stays where the job runs again; annotations in the output folder are refused."""
    table, output = tmp_path / "own.csv", tmp_path / "out"
    table.write_text(ROWS)
    given = ["--videos", str(own), "--annotations", str(table), "--output", str(output), "--small"]
    assert run_job("check_data.py", *given).status == 0
    (output / "recipe.yaml").write_text("mine")
    outcome = run_job("check_data.py", *given)
    assert outcome.status == 0, outcome.err
    assert (output / "recipe.yaml").read_text() == "mine"
    assert f"{output}/recipe.yaml stays as it is" in outcome.out
    index = (output / "annotations.json").read_bytes()
    given[3] = str(output / "annotations.json")
    outcome = run_job("check_data.py", *given)
    assert outcome.status == 2
    assert f"--output {output}: its annotations.json is what is to be checked" in outcome.err
    assert (output / "annotations.json").read_bytes() == index


@pytest.mark.parametrize(
    ("arguments", "rows", "line"),
    [
        (["--videos", "{none}"], ROWS, "--videos {none}: not a folder"),
        (["--videos", "{empty}"], ROWS, "{empty}: no video in this folder: no file ends in "),
        (["--annotations", "{none}"], ROWS, "{none}: cannot be read: No such file or directory"),
        (["--output", "{table}/x"], ROWS, "--output {table}/x: {table} is not a directory"),
        (["--test-subset", "dev"], ROWS, "{table}: --test-subset dev: the subsets with instances are "),
        (
            [],
            ROWS.replace("test", "two"),
            "{table}: no test subset among 'train' (5 videos), 'two' (1 videos)",
        ),
        ([], "video,start,end\n", "{table}: line 1: no column 'label'"),
        (
            [],
            "video,label,start,end,subset\na,Run,0,1,train\nbad,Run,0,1,test\n",
            "{table}: no usable instance to test on; the first of 1 problems: {videos}/bad.mp4: ",
        ),
        (
            [],
            "video,label,start,end,subset\na,Run,0,1,train\nb,Run,0,1,train\nc,,,,train\nd,Run,0,1,test\n",
            "{table}: no instance in the 1 selection videos, as they are drawn: name a third subset",
        ),
    ],
)
def test_refused(
    arguments: list[str], rows: str, line: str, own: Path, tmp_path: Path, run_job: RunJob
) -> None:
    """One line, status 2, nothing written."""
    places = {name: tmp_path / name for name in ("none", "empty", "videos")} | {"table": tmp_path / "own.csv"}
    places["empty"].mkdir()
    places["table"].write_text(rows)
    given = {"--videos": "{videos}", "--annotations": "{table}", "--output": "{none}"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    words = [word.format(**places) for option in given.items() for word in option]
    outcome = run_job("check_data.py", *words)
    assert outcome.status == 2
    (error,) = (text for text in outcome.err.splitlines() if text.startswith("error: "))
    assert error.startswith(f"error: {line.format(**places)}") and "Traceback" not in outcome.err
    assert not places["none"].exists()
