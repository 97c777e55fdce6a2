from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.config import DataConfig
from pbd_ray.data.annotations import (
    DETECTION_SCHEMA,
    GROUND_TRUTH_SCHEMA,
    Annotations,
    detections_to_json,
    load_annotations,
    read_detections,
    split,
    video_file,
    with_probe,
)
from pbd_ray.data.json_file import AnnotationError
from pbd_ray.data.video import VideoProbe


def entry(**changes: Any) -> dict[str, Any]:
    """A good video entry; a change to `...` takes the key out."""
    good = {
        "subset": "training",
        "duration": 10.0,
        "fps": 30,
        "frame": 300,
        "annotations": [{"label": "jump", "segment": [1, 2.5]}],
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not ...}


def write(folder: Path, database: Any, key: str = "database") -> Path:
    path = folder / "ann.json"
    path.write_text(json.dumps({key: database}))
    return path


def load_one(folder: Path, **changes: Any) -> Annotations:
    return load_annotations(write(folder, {"a": entry(**changes)}))


def instances(*segments: Any, label: str = "jump") -> list[dict[str, Any]]:
    return [{"label": label, "segment": segment} for segment in segments]


def test_reads_what_is_written(tmp_path: Path) -> None:
    annotations = load_annotations(
        write(
            tmp_path,
            {
                "b": entry(annotations=[*instances([1, 2], label="sit"), *instances([0, 10])]),
                "a": entry(subset="Testing", annotations=[], file="deep/a.avi"),
                "x/y": entry(annotations=instances([3, 4], label="Ambiguous")),
            },
        )
    )
    assert annotations.classes == ("jump", "sit")
    b, a, deep = annotations.videos
    assert (b.id, b.path, b.subset) == ("b", "b.mp4", "training")
    assert (b.duration_seconds, b.fps, b.frames) == (10, 30, 300)
    assert b.segments_seconds.tolist() == [[1, 2], [0, 10]] and b.segments_seconds.dtype == np.float64
    assert b.labels.tolist() == [1, 0] and b.labels.dtype == np.int32
    assert (a.path, a.subset) == ("deep/a.avi", "Testing")
    assert (a.segments_seconds.shape, a.labels.dtype) == ((0, 2), np.int32)
    assert deep.path == "x/y.mp4" and not len(deep.labels)


def test_stored_ground_truth_cannot_be_changed(tmp_path: Path) -> None:
    (video,) = load_one(tmp_path).videos
    with pytest.raises(ValueError, match="read-only"):
        video.segments_seconds[0, 0] = 5
    with pytest.raises(ValueError, match="read-only"):
        video.labels[0] = 5


@pytest.mark.parametrize(
    ("fields", "frames", "fps"),
    [
        ({"fps": 25, "frame": 250}, 250, 25.0),
        ({"fps": ..., "frame": 240}, 240, 24.0),
        ({"fps": ..., "frame": ..., "frames": 240}, 240, 24.0),
        ({"fps": ..., "frame": 240.0}, 240, 24.0),
        ({"fps": 29.97, "frame": ...}, 300, 29.97),
        ({"fps": 0.01, "frame": ...}, 1, 0.01),
        ({"fps": ..., "frame": ...}, 0, 0.0),
        ({"fps": None, "frame": None}, 0, 0.0),
    ],
)
def test_frames_and_fps(tmp_path: Path, fields: dict[str, Any], frames: int, fps: float) -> None:
    (video,) = load_one(tmp_path, **fields).videos
    assert (video.frames, video.fps) == (frames, fps)
    probed = with_probe(video, VideoProbe(frames=77, fps=12.5, width=4, height=3))
    assert (probed.frames, probed.fps, probed.id) == (77, 12.5, video.id)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"subset": ...}, "database['a']", "subset"),
        ({"subset": 3}, "database['a'].subset", "3"),
        ({"subset": ""}, "database['a'].subset", "''"),
        ({"duration": ...}, "database['a']", "duration"),
        ({"duration": "10"}, "database['a'].duration", "'10'"),
        ({"duration": True}, "database['a'].duration", "True"),
        ({"duration": 0}, "database['a'].duration", "0"),
        ({"duration": -1.5}, "database['a'].duration", "-1.5"),
        ({"duration": float("nan")}, "database['a'].duration", "nan"),
        ({"duration": float("inf")}, "database['a'].duration", "inf"),
        ({"duration": 10**400}, "database['a'].duration", "1000"),
        ({"duration": None}, "database['a'].duration", "None"),
        ({"fps": "30"}, "database['a'].fps", "'30'"),
        ({"fps": 0}, "database['a'].fps", "0"),
        ({"fps": 1e9, "frame": ...}, "database['a'].fps", "1000000000"),
        ({"frame": 12.5}, "database['a'].frame", "12.5"),
        ({"frame": False}, "database['a'].frame", "False"),
        ({"frame": -3}, "database['a'].frame", "-3"),
        ({"frame": ..., "frames": [1]}, "database['a'].frames", "[1]"),
        ({"annotations": ...}, "database['a']", "annotations"),
        ({"annotations": {}}, "database['a'].annotations", "{}"),
        ({"annotations": ["jump"]}, "database['a'].annotations[0]", "'jump'"),
        ({"annotations": [{"label": "jump"}]}, "database['a'].annotations[0]", "segment"),
        ({"annotations": [{"segment": [1, 2]}]}, "database['a'].annotations[0]", "label"),
        ({"annotations": instances([1, 2], label="")}, "database['a'].annotations[0].label", "''"),
        ({"annotations": instances([1, 2], label="a\nb")}, "database['a'].annotations[0].label", r"'a\nb'"),
        ({"annotations": instances([1, 2], [1])}, "database['a'].annotations[1].segment", "[1]"),
        ({"annotations": instances([1, 2, 3])}, "database['a'].annotations[0].segment", "[1, 2, 3]"),
        ({"annotations": instances("12")}, "database['a'].annotations[0].segment", "'12'"),
        ({"annotations": instances([1, "2"])}, "database['a'].annotations[0].segment[1]", "'2'"),
        ({"annotations": instances([True, 2])}, "database['a'].annotations[0].segment[0]", "True"),
        ({"annotations": instances([1, float("nan")])}, "database['a'].annotations[0].segment[1]", "nan"),
        ({"annotations": instances([3, 2])}, "database['a'].annotations[0].segment", "[3, 2]"),
        ({"file": 3}, "database['a'].file", "3"),
        ({"file": "../a.mp4"}, "database['a'].file", "'../a.mp4'"),
    ],
)
def test_errors_name_file_field_and_value(
    tmp_path: Path, changes: dict[str, Any], field: str, value: str
) -> None:
    with pytest.raises(AnnotationError) as caught:
        load_one(tmp_path, **changes)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'ann.json'}: {field}: ")
    assert value in message
    assert "\n" not in message and len(message) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "id_", ["../a", "a/../b", "/etc/passwd", "", "a/", "a\\b", "..", ".", "a\nb", "a\x00b", "\ud800"]
)
def test_ids_stay_inside_the_data_root(tmp_path: Path, id_: str) -> None:
    with pytest.raises(AnnotationError, match="is not a name inside the data root") as caught:
        load_annotations(write(tmp_path, {id_: entry()}))
    assert "\n" not in str(caught.value) and repr(id_) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"not json", "not JSON"),
        (b"", "not JSON"),
        (b'{"database": {', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[]", "expected an object, got []"),
        (b"{}", "expected a member 'database', got {}"),
        (b'{"database": []}', "database: expected an object, got []"),
        (b'{"database": {}}', "database: expected at least one video, got {}"),
        (b'{"database": {"a": 1}}', "database['a']: expected an object, got 1"),
        (b'{"database": {"a": {}, "b": {}, "a": {}}}', "key 'a' stands twice"),
        (b'{"database": {"a": {"fps": 1, "fps": 2}}}', "key 'fps' stands twice"),
    ],
    ids=range(13),
)
def test_files_that_are_no_annotations(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError) as caught:
        load_annotations(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and expected in message and "\n" not in message


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"none\.json: cannot be read: No such file or directory$"):
        load_annotations(tmp_path / "none.json")
    with pytest.raises(AnnotationError, match=r"cannot be read: Is a directory$"):
        load_annotations(tmp_path)


def test_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": entry()})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_annotations(path).videos) == 1


def test_instances_stay_as_they_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of zero length, outside of their video, or reaching out of it: the official evaluators count them."""
    segments = [[1, 1], [-2, 3], [4, 12], [11, 12], [-3, -1], [10, 10.5], [2, 3]]
    path = write(tmp_path, {"a": entry(annotations=instances(*segments))})
    with caplog.at_level(logging.WARNING):
        (video,) = load_annotations(path).videos
    assert video.segments_seconds.tolist() == segments and not caplog.records


def test_fps_that_contradicts_the_frame_count_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_one(tmp_path, fps=15)
    assert "1 videos whose fps differs from frame / duration" in caplog.text


def test_given_and_agnostic_classes(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": entry(annotations=[*instances([1, 2], label="sit"), *instances([3, 4])])})
    given = load_annotations(path, classes=("sit", "run", "jump"))
    assert given.classes == ("sit", "run", "jump") and given.videos[0].labels.tolist() == [0, 2]
    agnostic = load_annotations(path, class_agnostic=True)
    assert agnostic.classes == ("action",) and agnostic.videos[0].labels.tolist() == [0, 0]
    with pytest.raises(AnnotationError, match=r"label: expected one of the classes, got 'jump'$"):
        load_annotations(path, classes=("sit",))
    for wrong in ((), ("sit", "sit", "jump")):
        with pytest.raises(AnnotationError, match="expected distinct names"):
            load_annotations(path, classes=wrong)


def test_ambiguous_is_no_class_and_no_labels_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": entry(annotations=instances([1, 2], label="Ambiguous"))})
    with pytest.raises(AnnotationError, match="the classes must be given"):
        load_annotations(path)
    assert not load_annotations(path, classes=["jump"]).ground_truth().num_rows
    assert not load_annotations(path, class_agnostic=True).ground_truth().num_rows


def test_subset_select_and_ground_truth(tmp_path: Path) -> None:
    annotations = load_annotations(
        write(
            tmp_path,
            {
                "a": entry(annotations=instances([1, 2], [3, 4])),
                "b": entry(annotations=[]),
                "c": entry(subset="test", annotations=instances([5, 6], label="sit")),
            },
        )
    )
    assert [video.id for video in annotations.subset("training").videos] == ["a", "b"]
    assert annotations.subset("Training").videos == ()
    assert [video.id for video in annotations.select(["c", "a"]).videos] == ["c", "a"]
    with pytest.raises(AnnotationError, match="video 'd' is not among the 3 annotated videos"):
        annotations.select(["a", "d"])
    table = annotations.ground_truth()
    assert table.schema == GROUND_TRUTH_SCHEMA
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("a", 1.0, 2.0, 0),
        ("a", 3.0, 4.0, 0),
        ("c", 5.0, 6.0, 1),
    ]
    assert annotations.subset("none").ground_truth().schema == GROUND_TRUTH_SCHEMA


def many(folder: Path, fit: int = 20, order: int = 1, **others: int) -> Annotations:
    names = [("training", index) for index in range(fit)]
    names += [(subset, index) for subset, count in others.items() for index in range(count)]
    database = {f"{subset}_{index:02}": entry(subset=subset) for subset, index in names[::order]}
    return load_annotations(write(folder, database))


def ids(annotations: Annotations) -> list[str]:
    return [video.id for video in annotations.videos]


@pytest.mark.parametrize(
    ("fit", "fraction", "size"), [(20, 0.1, 2), (20, 0.0, 1), (20, 0.37, 7), (2, 0.5, 1), (3, 0.1, 1)]
)
def test_selection_is_drawn_from_fit(tmp_path: Path, fit: int, fraction: float, size: int) -> None:
    parts = split(many(tmp_path, fit, validation=3), DataConfig(selection_fraction=fraction), seed=5)
    assert len(parts.selection.videos) == size and len(parts.fit.videos) == fit - size
    assert sorted(ids(parts.fit) + ids(parts.selection)) == [f"training_{k:02}" for k in range(fit)]
    assert ids(parts.test) == ["validation_00", "validation_01", "validation_02"]


def test_the_draw_depends_on_seed_and_ids_alone(tmp_path: Path) -> None:
    config = DataConfig(selection_fraction=0.3)
    first = split(many(tmp_path, validation=3), config, seed=1)
    backwards = split(many(tmp_path, validation=5, order=-1), config, seed=1)
    assert set(ids(first.selection)) == set(ids(backwards.selection))
    draws = {tuple(ids(split(many(tmp_path, validation=3), config, seed).selection)) for seed in range(5)}
    assert len(draws) > 1
    fixed = DataConfig(selection_fraction=0.3, split_seed=1)
    assert ids(split(many(tmp_path, validation=3), fixed, seed=4).selection) == ids(first.selection)
    # a recorded draw: it must stay the same in later versions, or old runs could not be resumed
    assert ids(first.selection) == [f"training_{k:02}" for k in (1, 7, 10, 11, 16, 18)]


def test_named_selection_and_blocked_videos(tmp_path: Path) -> None:
    config = DataConfig(selection_subset="dev", blocked_videos=("validation_01", "training_03", "unheard-of"))
    parts = split(many(tmp_path, dev=2, validation=3), config, seed=0)
    assert ids(parts.selection) == ["dev_00", "dev_01"] and len(parts.fit.videos) == 20
    assert ids(parts.test) == ["validation_00", "validation_02"]


def test_the_paper_s_protocol(tmp_path: Path) -> None:
    """All training videos fit, and the test videos choose, whatever the recipe says of selection videos."""
    for settings in ({"selection_fraction": 0.3}, {"selection_subset": "dev"}):
        parts = split(many(tmp_path, dev=2, validation=3), DataConfig(**settings), 0, paper_protocol=True)
        assert len(parts.fit.videos) == 20
        assert ids(parts.selection) == ids(parts.test) == ["validation_00", "validation_01", "validation_02"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"fit_subset": "fit"}, "no fit videos"),
        ({"selection_fraction": 1.0}, "no fit videos"),
        ({"selection_subset": "dev"}, "no selection videos"),
        ({"test_subset": "test"}, "no test videos"),
        ({"blocked_videos": ("validation_00",)}, "no test videos"),
        ({"test_subset": "training"}, "data.test_subset: 'training' is data.fit_subset too"),
        ({"selection_subset": "training"}, "data.selection_subset: 'training' is data.fit_subset too"),
        ({"selection_subset": "validation"}, "data.test_subset: 'validation' is data.selection_subset too"),
    ],
)
def test_splits_that_cannot_be(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(AnnotationError) as caught:
        split(many(tmp_path, fit=4, validation=1), DataConfig(**settings), seed=0)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("id_", "file", "there", "found"),
    [
        ("a", None, ["a.mp4", "v_a.mp4"], "a.mp4"),
        ("a", None, ["a.mkv", "b.mp4"], "a.mkv"),
        ("a", None, ["a.webm", "a.avi"], "a.avi"),
        ("a", None, ["v_a.mp4"], "v_a.mp4"),
        ("a", None, ["v_a.mp4", "a.webm"], "a.webm"),
        ("a", "x/other.mov", ["a.mp4", "x/other.mov"], "x/other.mov"),
        ("a", "x/other.mov", ["a.mp4"], "a.mp4"),
        ("x/a", None, ["x/v_a.mkv"], "x/v_a.mkv"),
        ("a.b", None, ["a.b.mp4"], "a.b.mp4"),
        ("a", None, ["b.mp4", "a.mp4.part"], None),
    ],
)
def test_video_file(tmp_path: Path, id_: str, file: str | None, there: list[str], found: str | None) -> None:
    (video,) = load_annotations(write(tmp_path, {id_: entry(file=file)})).videos
    root = tmp_path / "videos"
    for name in there:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if found is None:
        with pytest.raises(AnnotationError, match=r"no file for video 'a': tried a\.mp4"):
            video_file(video, str(root))
    else:
        assert video_file(video, str(root)) == str(root / found)


def test_an_absolute_file_inside_the_root(tmp_path: Path) -> None:
    """The root itself may be a symbolic link."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "clip.mov").touch()
    (tmp_path / "root").symlink_to(tmp_path / "videos")
    (video,) = load_one(tmp_path, file=str(tmp_path / "videos" / "clip.mov")).videos
    assert video_file(video, str(tmp_path / "root")) == str(tmp_path / "videos" / "clip.mov")


def results_of(folder: Path, *items: Any) -> Path:
    return write(folder, {"a": list(items)}, key="results")


def detection(**changes: Any) -> dict[str, Any]:
    good = {"label": "jump", "segment": [1, 2], "score": 0.5}
    return {key: value for key, value in {**good, **changes}.items() if value is not ...}


def test_detections_go_out_and_come_back_unrounded(tmp_path: Path) -> None:
    rows = [("b", 0.1 + 0.2, 1 / 3, 1, 1e-17), ("a", 0.0, 0.0, 0, 1.0), ("b", 1e-9, 12.5, 0, 2 / 3)]
    table = pa.Table.from_pylist(
        [dict(zip(DETECTION_SCHEMA.names, row, strict=True)) for row in rows], schema=DETECTION_SCHEMA
    )
    document = detections_to_json(table, ("jump", "sit"))
    assert document["results"]["b"][0] == {"label": "sit", "segment": [0.1 + 0.2, 1 / 3], "score": 1e-17}
    path = tmp_path / "out.json"
    path.write_text(json.dumps(document))
    back = read_detections(path, ("jump", "sit")).table
    assert back.schema == DETECTION_SCHEMA
    assert back.sort_by([("video", "ascending"), ("score", "ascending")]).equals(
        table.sort_by([("video", "ascending"), ("score", "ascending")])
    )


@pytest.mark.parametrize("id_", ["\ud800", "a\nb"])
def test_video_ids_of_detections_are_printable(tmp_path: Path, id_: str) -> None:
    path = write(tmp_path, {id_: [detection()]}, key="results")
    with pytest.raises(AnnotationError) as caught:
        read_detections(path, ("jump",))
    assert str(caught.value).startswith(f"{path}: results[{id_!r}]: expected a printable video id, got ")


@pytest.mark.parametrize("value", [[[{"k" * 90: ["v" * 90] * 9}] * 9] * 9, "../" + "x" * 100_000, 10**3000])
def test_errors_quote_no_more_than_fits_into_a_line(tmp_path: Path, value: Any) -> None:
    for changes in ({"duration": value}, {"file": value}, {"annotations": value}):
        with pytest.raises(AnnotationError) as caught:
            load_one(tmp_path, **changes)
        assert len(str(caught.value)) < 300 + len(str(tmp_path))
    with pytest.raises(AnnotationError) as caught:
        load_annotations(write(tmp_path, {"k" * 100_000: value}))
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_no_detections(tmp_path: Path) -> None:
    table = read_detections(results_of(tmp_path), ("jump",)).table
    assert table.schema == DETECTION_SCHEMA and not table.num_rows
    assert detections_to_json(table, ("jump",))["results"] == {}


def test_unknown_labels_and_videos_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        tmp_path,
        {"a": [detection(), detection(label="fly"), detection(label="swim")], "z": [detection()]},
        key="results",
    )
    with caplog.at_level(logging.WARNING):
        table = read_detections(path, ("sit", "jump"), videos=["a", "b"]).table
    assert [tuple(row.values()) for row in table.to_pylist()] == [("a", 1.0, 2.0, 1, 0.5)]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 2 detections of unknown labels left out; 1 detections of unknown videos left out"
    ]


def test_left_out_detections_as_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, {"a": [detection(), detection(label="fly")], "z": [detection()]}, key="results")
    found = read_detections(path, ("jump",), videos=["a"])
    assert (found.table.num_rows, found.unknown_labels, found.unknown_videos) == (1, 1, 1)


ODD = [{}, {"segment": [1e9, 1e9]}, {"segment": [-3, 0.5]}, {"more": None}, {"score": 2}]


@pytest.mark.parametrize("odd", ODD)
def test_odd_detections_are_read_as_they_stand(tmp_path: Path, odd: dict[str, Any]) -> None:
    items = [detection(), detection(**odd)]
    rows = read_detections(results_of(tmp_path, *items), ("jump",)).table.to_pylist()
    expected = [("a", *item["segment"], 0, item["score"]) for item in items]
    assert [tuple(row.values()) for row in rows] == expected


@pytest.mark.parametrize(
    ("item", "field", "value"),
    [
        (detection(score=True), "results['a'][0].score", "True"),
        (detection(score=10**400), "results['a'][0].score", "1000"),
        (detection(score=-2e9), "results['a'][0].score", "-2000000000.0"),
        (detection(segment={"1": 2, "2": 3}), "results['a'][0].segment", "{'1': 2, '2': 3}"),
        (detection(segment="12"), "results['a'][0].segment", "'12'"),
        (detection(segment=[1, None]), "results['a'][0].segment[1]", "None"),
        (detection(label=["jump"]), "results['a'][0].label", "['jump']"),
        (detection(label=""), "results['a'][0].label", "''"),
        (detection(score=...), "results['a'][0]", "score"),
        (detection(score="0.5"), "results['a'][0].score", "'0.5'"),
        (detection(score=float("nan")), "results['a'][0].score", "nan"),
        (detection(segment=[2, 1]), "results['a'][0].segment", "[2, 1]"),
        (detection(segment=[2]), "results['a'][0].segment", "[2]"),
        (detection(label=4), "results['a'][0].label", "4"),
        (7, "results['a'][0]", "7"),
    ],
)
def test_detection_errors(tmp_path: Path, item: Any, field: str, value: str) -> None:
    path = results_of(tmp_path, item)
    with pytest.raises(AnnotationError) as caught:
        read_detections(path, ("jump",))
    message = str(caught.value)
    assert message.startswith(f"{path}: {field}: ") and value in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "videos", "classes", "published"),
    [
        ("thumos14", {"training": 200, "validation": 212}, 20, 6365),
        ("activitynet", {"training": 9649, "validation": 4728, "testing": 4851}, 200, 22152),
        ("arid_composed", {"training": 41, "validation": 10}, 4, 299),
    ],
)
def test_real_files(shared: Path, name: str, videos: dict[str, int], classes: int, published: int) -> None:
    path = shared / "data" / name / "annotations.json"
    annotations = load_annotations(path)
    assert {subset: len(annotations.subset(subset).videos) for subset in videos} == videos
    assert len(annotations.classes) == classes == len(annotations.ground_truth()["label"].unique())
    assert annotations.ground_truth().num_rows == published


def test_real_detections(shared: Path) -> None:
    folder = shared / "data" / "thumos14"
    classes = load_annotations(folder / "annotations.json").classes
    assert classes == tuple((folder / "classes.txt").read_text().split())
    table = read_detections(folder / "a2net_predictions.json", classes).table
    raw = json.loads((folder / "a2net_predictions.json").read_text())["results"]
    assert table.num_rows == sum(len(items) for items in raw.values())
    assert detections_to_json(table, classes)["results"] == {
        key: items for key, items in raw.items() if items
    }


def test_as_published_counts_what_the_official_evaluators_count(shared: Path) -> None:
    folder = shared / "data" / "thumos14"
    expected = json.loads((folder / "expected.json").read_text())["num_ground_truth"]
    path = folder / "a2net_ground_truth.json"
    assert load_annotations(path).ground_truth().num_rows == expected
    # 22 instances of video_test_0000270 lie beyond its end; without them mAP would be half a point higher
    (video,) = load_annotations(path).select(["video_test_0000270"]).videos
    assert (video.segments_seconds[:, 0] >= video.duration_seconds).sum() == 22


def test_markup_is_text(tmp_path: Path) -> None:
    """Ids, labels and subsets are carried as they are written; whoever prints them escapes them."""
    name = '<script>alert("1")</script>&amp;\'$x_{$'
    action = {"label": name, "segment": [1.0, 2.5]}
    (video,) = load_annotations(write(tmp_path, {"<b>a": entry(annotations=[action], subset=name)})).videos
    assert (video.id, video.subset, video.path) == ("<b>a", name, "<b>a.mp4")
    found = results_of(tmp_path, {**action, "score": 0.5})
    table = read_detections(found, [name]).table
    assert detections_to_json(table, [name])["results"] == {"a": [{**action, "score": 0.5}]}
