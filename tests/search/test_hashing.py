from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.search.hashing import annotations_hash, table_hash, value_hash, weights_hash

TABLE = pa.table(
    {
        "video": ["b", "a", "a"],
        "score": pa.array([0.5, None, 0.25], pa.float64()),
        "label": pa.array([1, 2, 3], pa.int32()),
        "kept": [True, False, None],
    }
)


@pytest.mark.parametrize(
    "same",
    [
        TABLE.take([2, 0, 1]),
        TABLE.select(["label", "score", "video", "kept"]),
        pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)]),
        TABLE.replace_schema_metadata({"learning_rate": "1"}),
        TABLE.set_column(0, "video", TABLE["video"].dictionary_encode()),
        TABLE.slice(0),
    ],
    ids=["rows", "columns", "chunks", "metadata", "dictionary", "view"],
)
def test_table_hash_does_not_see_layout(same: pa.Table) -> None:
    assert table_hash(same) == table_hash(TABLE)


@pytest.mark.parametrize(
    "other",
    [
        TABLE.slice(1),
        TABLE.rename_columns(["video", "score", "label", "keep"]),
        TABLE.set_column(1, "score", pa.array([0.5, 0.0, 0.25])),
        TABLE.set_column(2, "label", pa.array([1, 2, 3], pa.int64())),
        TABLE.set_column(3, "kept", pa.array([True, False, False])),
        TABLE.set_column(0, "video", pa.array(["ba", "", "a"])),
    ],
    ids=["a row", "a name", "null is not zero", "a type", "null is not false", "where strings end"],
)
def test_table_hash_sees_content(other: pa.Table) -> None:
    assert table_hash(other) != table_hash(TABLE)


def test_table_hash_of_nothing() -> None:
    assert table_hash(pa.table({})) == table_hash(pa.table({}))
    assert table_hash(TABLE.slice(0, 0)) != table_hash(pa.table({}))


def test_table_hash_refuses_what_it_cannot_say() -> None:
    with pytest.raises(TypeError, match="cannot hash column 'x' of type struct"):
        table_hash(pa.table({"x": [{"a": 1}]}))


def test_weights_hash_does_not_see_order_or_strides() -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    weights = {"a": a, "b": np.ones(2, np.int64)}
    same = {"b": np.ones(2, np.int64), "a": np.asfortranarray(a)}
    assert weights_hash(same) == weights_hash(weights)
    assert weights_hash({"a": a.astype(">f4"), "b": weights["b"]}) == weights_hash(weights)


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.zeros(4, np.float32)},
        {"b": np.zeros((2, 2), np.float32)},
        {"a": np.zeros((2, 2), np.int32)},
        {"a": np.array([[0, 0], [0, 1e-30]], np.float32)},
        {"a": np.array([[0, 0], [0, -0.0]], np.float32)},
        {},
    ],
    ids=["shape", "name", "dtype", "value", "sign of zero", "none"],
)
def test_weights_hash_sees_content(other: dict[str, np.ndarray]) -> None:
    assert weights_hash(other) != weights_hash({"a": np.zeros((2, 2), np.float32)})


def test_scalars_keep_their_shape() -> None:
    assert weights_hash({"a": np.float32(1).reshape(())}) != weights_hash({"a": np.ones(1, np.float32)})


def test_value_hash() -> None:
    assert value_hash({"a": 1, "b": [0.1]}) == value_hash({"b": [0.1], "a": 1})
    assert value_hash([0.1]) != value_hash([0.1 + 1e-16 * 2])
    with pytest.raises(ValueError, match="JSON"):
        value_hash([float("nan")])


def test_annotations_hash(make_videos) -> None:
    data = make_videos("fit", 3, 0)
    video = data.videos[0]
    moved = replace(video, path="elsewhere.mp4")
    assert annotations_hash(replace(data, videos=data.videos[::-1])) == annotations_hash(data)
    assert annotations_hash(replace(data, videos=(moved, *data.videos[1:]))) == annotations_hash(data)
    for change in (
        {"segments_seconds": video.segments_seconds + 1e-9},
        {"labels": 1 - video.labels},
        {"fps": 9.0},
        {"subset": "test"},
    ):
        other = replace(data, videos=(replace(video, **change), *data.videos[1:]))
        assert annotations_hash(other) != annotations_hash(data), change
    assert annotations_hash(replace(data, classes=("run", "jump"))) != annotations_hash(data)
