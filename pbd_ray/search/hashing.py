"""Hashes of logical content: of what a value says, not of the bytes a file happens to hold.

Two runs that computed the same thing get the same hash, whatever the order in which tensors or rows were
written, how Arrow chunked a column, or which Parquet version wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pbd_ray.data.annotations import Annotations


def bytes_hash(content: bytes) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()


def value_hash(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form: sorted keys, shortest exact floats.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON cannot say.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return bytes_hash(text.encode())


def weights_hash(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over tensors sorted by name: name, dtype, shape, little-endian C-order bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        _feed(digest, name.encode())
        _feed(digest, f"{tensor.dtype.name}{list(tensor.shape)}".encode())
        _feed(digest, _array_bytes(tensor))
    return digest.hexdigest()


def table_hash(table: pa.Table) -> str:
    """SHA-256 over an Arrow table's columns sorted by name and rows sorted by all columns.

    Chunks, dictionary encoding and schema metadata do not count. Columns are booleans, numbers, strings.

    Raises:
        TypeError: a column of another type.
    """
    columns = {name: _plain(table.column(name).combine_chunks()) for name in sorted(table.column_names)}
    digest = hashlib.sha256()
    _feed(digest, str(table.num_rows).encode())
    for name, column in columns.items():
        if not _is_string(column.type) and not _is_number(column.type):
            raise TypeError(f"cannot hash column '{name}' of type {column.type}")
    order = pc.sort_indices(pa.table(columns), [(name, "ascending") for name in columns]) if columns else None
    for name, column in columns.items():
        _feed(digest, name.encode())
        _feed_column(digest, column.take(order))
    return digest.hexdigest()


def annotations_hash(annotations: Annotations) -> str:
    """SHA-256 of the classes and, by video id, what is annotated and what a video classifier says. File
    names do not count."""
    digest = hashlib.sha256()
    _feed(digest, json.dumps(list(annotations.classes)).encode())
    for video in sorted(annotations.videos, key=lambda video: video.id):
        facts = [video.id, video.subset, float(video.duration_seconds), float(video.fps), int(video.frames)]
        _feed(digest, json.dumps(facts).encode())
        _feed(digest, _array_bytes(np.asarray(video.segments_seconds, dtype=np.float64)))
        _feed(digest, _array_bytes(np.asarray(video.labels, dtype=np.int32)))
    naming = annotations.video_classes
    if naming is not None:
        _feed(digest, annotations_hash(naming.published).encode())
        for video in sorted(naming.published.videos, key=lambda video: video.id):
            _feed(digest, _array_bytes(naming.probabilities[video.id]))
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, content: bytes) -> None:
    # The length goes first, so that neighbours cannot trade bytes.
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)


def _array_bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def _plain(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _feed_column(digest: hashlib._Hash, column: pa.Array) -> None:
    kind = column.type
    if _is_string(kind):
        texts = [None if text is None else text.encode() for text in column.to_pylist()]
        lengths = np.array([-1 if text is None else len(text) for text in texts], dtype=np.int64)
        _feed(digest, b"string")
        _feed(digest, _array_bytes(lengths))
        _feed(digest, b"".join(text for text in texts if text is not None))
    else:
        zero = pa.scalar(False if pa.types.is_boolean(kind) else 0, kind)
        _feed(digest, str(kind).encode())
        _feed(digest, _array_bytes(column.is_null().to_numpy(zero_copy_only=False)))
        _feed(digest, _array_bytes(column.fill_null(zero).to_numpy(zero_copy_only=False)))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))
