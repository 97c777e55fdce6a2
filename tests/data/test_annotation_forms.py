"""The same content in every form people have it in, and the line about each row that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.data.annotation_forms import Written, read_written
from pbd_ray.data.json_file import AnnotationError

CONTENT = [
    ("a", "val", "Run", 0.5, 2.0),
    ("a", "val", "High Jump", 1.0, 3.5),
    ("b", "test", "Run", 4.0, 9.25),
    ("a", "val", "Run", 5.0, 6.0),
    ("b", "test", "Ambiguous", 1.0, 2.0),
]


def as_json(path: Path) -> Path:
    database: dict[str, Any] = {}
    for id_, subset, label, start, end in CONTENT:
        entry = database.setdefault(id_, {"subset": subset, "annotations": []})
        entry["annotations"].append({"label": label, "segment": [start, end]})
    (path / "own.json").write_text(json.dumps({"database": database}))
    return path / "own.json"


def as_csv(path: Path) -> Path:
    """As a spreadsheet may save it: a byte order mark, other columns, blanks, an empty line."""
    rows = [f'{id_}, "{label}",1,{start},{end} ,{subset}' for id_, subset, label, start, end in CONTENT]
    lines = ["\ufeffVideo,label,note,start,end,subset", rows[0], "", *rows[1:], ""]
    (path / "own.CSV").write_bytes("\r\n".join(lines).encode())
    return path / "own.CSV"


def as_thumos(path: Path) -> Path:
    """Folders and files as THUMOS14 comes, with its other text files."""
    folder = path / "TH14" / "annotation"
    folder.mkdir(parents=True)
    for name in ("readme.txt", "detclasslist.txt"):
        (folder / name).write_text("7 BaseballPitch\n")
    for id_, subset, label, start, end in CONTENT:
        with (folder / f"{label}_{subset}.txt").open("a") as file:
            file.write(f"{id_}  {start} {end}\n")
    return path / "TH14"


def content(written: Written) -> set[tuple[Any, ...]]:
    return {
        (video.id, video.subset, one.label, one.start_seconds, one.end_seconds)
        for video in written.videos
        for one in video.instances
    }


@pytest.mark.parametrize(
    ("write", "form"), [(as_json, "ActivityNet JSON"), (as_csv, "CSV"), (as_thumos, "THUMOS14 text files")]
)
def test_three_forms_of_the_same(write: Callable[[Path], Path], form: str, tmp_path: Path) -> None:
    written = read_written(write(tmp_path))
    assert (written.form, written.problems) == (form, ())
    assert {video.id for video in written.videos} == {"a", "b"}
    assert content(written) == {row for row in CONTENT if row[2] != "Ambiguous"}
    assert all(
        (video.frames, video.duration_seconds, video.file) == (0, 0.0, None) for video in written.videos
    )


def test_what_json_knows_more(tmp_path: Path) -> None:
    entry = {"subset": "s", "duration": 8, "frame": 240, "file": "x/a.mkv", "annotations": []}
    (tmp_path / "own.json").write_text(json.dumps({"database": {"a": entry}}))
    (video,) = read_written(tmp_path / "own.json").videos
    assert (video.id, video.file, video.frames, video.duration_seconds) == ("a", "x/a.mkv", 240, 8.0)


def test_json_videos_called_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"database": {"x/a.MOV": {"annotations": []}}}))
    (video,) = read_written(tmp_path / "own.json").videos
    assert (video.id, video.file) == ("x/a.MOV", "x/a.MOV")


def test_videos_called_by_their_files(tmp_path: Path) -> None:
    """A suffix names a file; a row without an instance is a video without instances."""
    (tmp_path / "own.csv").write_text("video,label,start,end\nx/a.MOV,Run,0,1\nx/b.1,,,\n")
    videos = read_written(tmp_path / "own.csv").videos
    assert [(video.id, video.file, len(video.instances)) for video in videos] == [
        ("x/a", "x/a.MOV", 1), ("x/b.1", None, 0)
    ]  # fmt: skip


HEAD = "video,label,start,end,subset"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("own.csv", "a,Run,x,3,s", "{path}: line 3, [start, end][0]: expected a number, got 'x'"),
        ("own.csv", "a,Run,1,,s", "{path}: line 3, [start, end][1]: expected a number, got ''"),
        (
            "own.csv",
            "a,Run,nan,3,s",
            "{path}: line 3, [start, end][0]: expected a finite number, at most 1e+09",
        ),
        (
            "own.csv",
            "a,Run,4,3,s",
            "{path}: line 3, [start, end]: the segment ends before it starts, got [4.0, 3",
        ),
        ("own.csv", "a,,4,5,s", "{path}: line 3, label: expected a printable, non-empty text, got ''"),
        ("own.csv", ",Run,4,5,s", "{path}: line 3, video: expected a printable, non-empty text, got ''"),
        ("own.csv", "../a,Run,4,5,s", "{path}: line 3, video: '../a' is not a name inside the data root"),
        ("own.csv", "a,Run,4,5", "{path}: line 3: expected 5 cells, got ['a', 'Run', '4', '5']"),
        (
            "own.csv",
            "good,Run,4,5,t",
            "{path}: line 3, subset: expected 's' as video 'good' has at {path}: line 2, got 't'",
        ),
        (
            "own.csv",
            "good.mp4,Run,4,5,s",
            "{path}: line 3, file: expected None as video 'good' has at {path}: line 2, got 'good.mp4'",
        ),
        ("Run_val.txt", "a 1", "{path}: line 2: expected 'VIDEO START END', got 'a 1'"),
        ("Run_val.txt", "a 1 x", "{path}: line 2, [start, end][1]: expected a number, got 'x'"),
        (
            "Run_val.txt",
            "a 2 1",
            "{path}: line 2, [start, end]: the segment ends before it starts, got [2.0, 1.0]",
        ),
        (
            "own.json",
            '"a": {"annotations": [{"label": "Run", "segment": [2, 1]}]}',
            "{path}: database['a'].annotations[0].segment: the segment ends before it starts, got [2, 1]",
        ),
        ("own.json", '"a": {"annotations": 3}', "{path}: database['a'].annotations: expected a list, got 3"),
        ("own.json", '"a": {}', "{path}: database['a']: expected a member 'annotations', got {{}}"),
        (
            "own.json",
            '"a": {"duration": 0, "annotations": []}',
            "{path}: database['a'].duration: expected more than 0, got 0",
        ),
        (
            "own.json",
            '"../a": {"annotations": []}',
            "{path}: database['../a']: '../a' is not a name inside the data root",
        ),
    ],
)
def test_rows_that_cannot_be_read(name: str, text: str, line: str, tmp_path: Path) -> None:
    """A line each; the others are read."""
    path = tmp_path / name
    video = '"good": {"annotations": [{"label": "Run", "segment": [0, 1]}]}'
    whole = {
        "own.csv": f"{HEAD}\ngood,Run,0,1,s\n{text}\n",
        "Run_val.txt": f"good 0 1\n{text}\n",
        "own.json": f'{{"database": {{{video}, {text}}}}}',
    }
    path.write_text(whole[name])
    written = read_written(tmp_path if name.endswith(".txt") else path)
    (problem,) = written.problems
    assert problem.line.startswith(line.format(path=path))
    (first, *_) = written.videos
    assert (first.id, [one.label for one in first.instances]) == ("good", ["Run"])


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "own.csv",
            "video,label,start\n",
            "{path}: line 1: no column 'end', got ['video', 'label', 'start']",
        ),
        ("own.csv", "", "{path}: line 1: no column 'video', 'label', 'start', 'end', got []"),
        ("own.csv", f"{HEAD}\n", "{path}: no video can be read from it"),
        (
            "own.csv",
            f"{HEAD}\na,Run,x,1,s\n",
            "{path}: no video can be read from it; the first problem: {path}: line 2",
        ),
        ("own.csv", f'{HEAD}\na,"Run,0,1,s\n', "{path}: line 2: not CSV: unexpected end of data"),
        ("own.json", "nothing", "{path}: not JSON: "),
        ("own.json", '{"database": {}}', "{path}: no video can be read from it"),
        ("none.json", None, "{path}: cannot be read: No such file or directory"),
        ("folder", None, "{path}: no file CLASS_val.txt, CLASS_test.txt or CLASS_train.txt"),
    ],
)
def test_what_is_of_no_form(name: str, text: str | None, line: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif text is not None:
        path.write_text(text)
    with pytest.raises(AnnotationError) as error:
        read_written(path)
    assert str(error.value).startswith(line.format(path=path))
