"""Every problem that annotations can have beside their files, and its line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pbd_ray.data.annotation_forms import read_written
from pbd_ray.data.annotations import annotations_to_json, load_annotations
from pbd_ray.data.checking import Checked, check_data, unchecked_videos
from pbd_ray.data.examine import Finding
from pbd_ray.data.json_file import AnnotationError
from pbd_ray.data.subsets import assign_subsets
from pbd_ray.data.video import VideoProbe

HEAD = "video,label,start,end,subset"
PROBE = VideoProbe(frames=100, fps=10.0, width=64, height=48)
GOOD = ("a,Run,0,2,train", "e,Sit,3,4,train", "b,Run,1,2,test", "b,Sit,2,4,test")


def check(folder: Path, *rows: str, **reasons: str) -> Checked:
    """Check rows of a CSV file whose videos last 10 s.

    Args:
        reasons: video -> why its file cannot be used.
    """
    path = folder / "own.csv"
    path.write_text("\n".join([HEAD, *rows, ""]))
    written = read_written(path)
    videos = unchecked_videos(written, assign_subsets(written, str(path)).subsets, [])
    findings = [
        Finding(video, reasons[video.id]) if video.id in reasons else Finding(video, None, PROBE)
        for video in videos
    ]
    return check_data(written, findings, str(path))


def segments(checked: Checked) -> list[tuple[str, str, list[float]]]:
    return [
        (video.id, checked.annotations.classes[label], segment)
        for video in checked.annotations.videos
        for segment, label in zip(video.segments_seconds.tolist(), video.labels.tolist(), strict=True)
    ]


KEPT = [("a", "Run", [0, 2]), ("e", "Sit", [3, 4]), ("b", "Run", [1, 2]), ("b", "Sit", [2, 4])]


def test_nothing_is_wrong(tmp_path: Path) -> None:
    checked = check(tmp_path, *GOOD)
    assert checked.problems == () and segments(checked) == KEPT
    assert checked.short_side_pixels == 48
    assert [(v.subset, v.frames, v.fps, v.duration_seconds) for v in checked.annotations.videos] == [
        *[("training", 100, 10.0, 10.0)] * 2, ("validation", 100, 10.0, 10.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "line", "more"),
    [
        ("a,Run,5,5,train", "{row}, [start, end]: zero length, left out, got [5.0, 5.0]", []),
        (
            "a,Run,10,12,train",
            "{row}, [start, end]: outside of the video of 10 s, left out, got [10.0, 12.0]",
            [],
        ),
        (
            "a,Run,9,12,train",
            "{row}, [start, end]: reaches out of the video of 10 s, cut, got [9.0, 12.0]",
            [("a", "Run", [9, 10])],
        ),
        (
            "a,Run,-1,0.0,train",
            "{row}, [start, end]: outside of the video of 10 s, left out, got [-1.0, 0.0]",
            [],
        ),
        ("a,Run,9,10.05,train", None, [("a", "Run", [9, 10])]),
        (
            "a,Run,0,2,train",
            "{row}, [start, end]: a second 'Run' at the same time, left out, got [0.0, 2.0]",
            [],
        ),
        ("a,Sit,0,2,train", None, [("a", "Sit", [0, 2])]),
        (
            "a,Run,1,3,train",
            "{row}, [start, end]: overlaps another 'Run' that ends at 2, kept, got [1.0, 3.0]",
            [("a", "Run", [1, 3])],
        ),
        ("a,Run,2,3,train", None, [("a", "Run", [2, 3])]),
        ("a,Run,4,3,train", "{row}, [start, end]: the segment ends before it starts, got [4.0, 3.0]", []),
        ("c,Run,0,1,train", None, [("c", "Run", [0, 1])]),
        ("bad,Run,0,1,train", "bad.mp4: a reason", []),
    ],
)
def test_problems_of_instances_and_files(
    row: str, line: str | None, more: list[tuple[str, str, list[float]]], tmp_path: Path
) -> None:
    checked = check(tmp_path, *GOOD, row, bad="bad.mp4: a reason")
    lines = [problem.line for problem in checked.problems]
    assert lines == ([] if line is None else [line.format(row=f"{tmp_path / 'own.csv'}: line 6")])
    assert sorted(segments(checked)) == sorted(KEPT + more)


def test_one_file_under_two_names(tmp_path: Path) -> None:
    """It could train under one of them and test under the other."""
    path = tmp_path / "own.csv"
    path.write_text("\n".join([HEAD, *GOOD, "deep/a,Sit,5,6,test", ""]))
    written = read_written(path)
    subsets = assign_subsets(written, str(path)).subsets
    videos = unchecked_videos(written, subsets, ["deep/a.mp4", "b.mp4", "e.mp4"])
    checked = check_data(written, [Finding(video, None, PROBE) for video in videos], str(path))
    assert [problem.line for problem in checked.problems] == [
        "deep/a.mp4: the file of video 'a' is that of 'deep/a' too, left out"
    ]
    assert segments(checked) == KEPT


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        (
            ["a,Hop,5,6,train"],
            ["label 'Hop': one instance only", "label 'Hop': no instance in validation"],
        ),
        (["a,Hop,5,6,train", "a,Hop,7,8,train"], ["label 'Hop': no instance in validation"]),
        (["a,Hop,5,6,train", "b,Hop,7,8,test"], []),
        (["b,Hop,5,6,test", "b,Hop,7,8,test"], ["label 'Hop': no instance in training"]),
    ],
)
def test_problems_of_classes(rows: list[str], lines: list[str], tmp_path: Path) -> None:
    found = check(tmp_path, *GOOD, *rows).problems
    assert [problem.line for problem in found] == [f"{tmp_path / 'own.csv'}: {line}" for line in lines]


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ({"duration": 10.2}, None),
        ({"frame": 100, "duration": 10.2}, None),
        ({"frame": 100, "duration": 12.0}, "a.mp4: the file lasts 10 s, its annotation says 12 s"),
    ],
)
def test_another_length_than_the_files(written: dict[str, float], line: str | None, tmp_path: Path) -> None:
    """Also where the frames are the annotated ones; the look at the file compares the rest."""
    checked = check_with(tmp_path, written)
    assert [problem.line for problem in checked.problems] == ([] if line is None else [line])


def check_with(folder: Path, facts: dict[str, float]) -> Checked:
    path = folder / "own.csv"
    path.write_text("\n".join([HEAD, *GOOD, "c,Run,0,1,train", "c,Sit,2,3,train", ""]))
    read = read_written(path)
    annotated = {"duration_seconds": facts.get("duration", 0.0), "frames": int(facts.get("frame", 0))}
    videos = tuple(replace(video, **annotated) if video.id == "a" else video for video in read.videos)
    read = replace(read, videos=videos)
    unchecked = unchecked_videos(read, assign_subsets(read, str(path)).subsets, [])
    return check_data(read, [Finding(video, None, PROBE) for video in unchecked], str(path))


@pytest.mark.parametrize(
    ("rows", "reasons", "subset", "first"),
    [
        (GOOD, {"b": "b.mp4: a reason"}, "validation", "b.mp4: a reason"),
        (GOOD, {"a": "a.mp4: a reason", "e": "e.mp4: none"}, "training", "a.mp4: a reason"),
        (
            ("a,Run,0,2,train", "b,Run,20,21,test"),
            {},
            "validation",
            "{path}: line 3, [start, end]: outside of",
        ),
    ],
)
def test_nothing_is_left(
    rows: tuple[str, ...], reasons: dict[str, str], subset: str, first: str, tmp_path: Path
) -> None:
    with pytest.raises(AnnotationError) as error:
        check(tmp_path, *rows, **reasons)
    path, count = tmp_path / "own.csv", max(1, len(reasons))
    purpose = {"training": "train on", "validation": "test on"}[subset]
    line = f"{path}: no usable instance to {purpose}; the first of {count} problems: "
    assert str(error.value).startswith(line + first.format(path=path))


def test_none_is_left_to_choose_by(tmp_path: Path) -> None:
    """One training video cannot both train and choose; with a third subset it need not."""
    rows = ("a,Run,0,2,train", "b,Run,1,2,test")
    with pytest.raises(
        AnnotationError, match="one usable video beside the test videos, none is left to choose"
    ):
        check(tmp_path, *rows)
    assert check(tmp_path, *rows, "c,Run,1,2,val").annotations.subset("selection").videos


def test_the_index_is_read_as_it_was_checked(tmp_path: Path) -> None:
    checked = check(tmp_path, *GOOD)
    (tmp_path / "index.json").write_text(json.dumps(annotations_to_json(checked.annotations, "1")))
    again = load_annotations(tmp_path / "index.json")
    assert again.classes == checked.annotations.classes
    assert annotations_to_json(again, "1") == annotations_to_json(checked.annotations, "1")


@pytest.mark.parametrize(
    ("video", "files", "path"),
    [
        ("a", ["a.mp4"], "a.mp4"),
        ("a", ["x/a.MOV", "b.mp4"], "x/a.MOV"),
        ("a", ["v_a.mkv"], "v_a.mkv"),
        ("a.avi", ["deep/er/a.avi"], "deep/er/a.avi"),
        ("a", ["x/a.mp4", "y/a.mp4"], "a.mp4"),  # which one cannot be told
        ("a", ["a.mp4", "y/a.mp4"], "a.mp4"),
        ("x/a", ["x/a.mp4", "y/a.mp4"], "x/a.mp4"),
        ("x/a", ["x/a.mov", "y/a.mov"], "x/a.mov"),
        ("x/a", ["y/a.mp4"], "x/a.mp4"),  # another one, which may be another video's
        ("a.b", ["z/a.b.mp4"], "z/a.b.mp4"),
    ],
)
def test_where_the_file_is(video: str, files: list[str], path: str, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(f"{HEAD}\n{video},Run,0,1,train\n")
    written = read_written(tmp_path / "own.csv")
    (found,) = unchecked_videos(written, {written.videos[0].id: "training"}, files)
    assert found.path == path
