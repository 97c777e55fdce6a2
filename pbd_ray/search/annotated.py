"""videos.parquet: the annotated videos of a run, so that what it stored can be scored again from the run
directory alone. File names are left out: where the videos lay is not part of what was computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pbd_ray.config import one_line
from pbd_ray.data.annotations import Annotations, Split, Video
from pbd_ray.data.video_classes import VideoClasses
from pbd_ray.search.hashing import annotations_hash, value_hash
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.storage import LedgerError, Storage

NAME = "videos.parquet"

VIDEOS_SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("published", pa.bool_()),
        ("video", pa.string()),
        ("subset", pa.string()),
        ("duration_seconds", pa.float64()),
        ("fps", pa.float64()),
        ("frames", pa.int64()),
        ("starts", pa.list_(pa.float64())),
        ("ends", pa.list_(pa.float64())),
        ("labels", pa.list_(pa.int32())),
        ("probabilities", pa.list_(pa.float64())),
    ]
)
"""One row a video of a part (fit, selection, test). `published`: the same videos with the labels that mAP
compares with and what a video classifier says of them, where detection is class-agnostic."""
FACTS = "parts"
"""In the schema's metadata: by part, its class names and, class-agnostic, `published` ones and `top`."""


def split_hash(split: Split) -> str:
    """SHA-256 of what is annotated in the three parts: `data_hash` of environment.json."""
    return value_hash([annotations_hash(part) for part in split.parts.values()])


def record_split(storage: Storage, split: Split) -> None:
    """Write the split down, unless the record that is there says the same."""
    table, facts = split_to_table(split)
    try:
        if storage.exists(NAME) and split_hash(split_from_table(storage.read_table(NAME))) == split_hash(
            split
        ):
            return
    except (LedgerError, KeyError, TypeError, ValueError):
        pass  # damaged: it is made anew from what the run was given
    storage.write_table(NAME, table, facts)


def recorded_split(ledger: Ledger) -> Split:
    """The videos of a run, as they were annotated when it began; their paths are empty.

    Raises:
        LedgerError: there is no record, or it is not of the videos that the run began with.
    """
    storage, environment = ledger.storage, ledger.environment()
    where = storage.uri(NAME)
    if environment is None or not storage.exists(NAME):
        raise LedgerError(f"{where} is missing: the run has not looked at its videos yet")
    try:
        split = split_from_table(storage.read_table(NAME))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(f"{where}: not a record of videos: {one_line(error)}") from None
    if split_hash(split) != environment["first"]["data_hash"]:
        raise LedgerError(f"{where}: not the videos that the run began with")
    return split


def split_to_table(split: Split) -> tuple[pa.Table, dict[str, str]]:
    """VIDEOS_SCHEMA rows, and the facts that go into the file's metadata."""
    rows = [row for name, part in split.parts.items() for row in _rows(name, part)]
    return pa.Table.from_pylist(rows, schema=VIDEOS_SCHEMA), {
        FACTS: json.dumps({name: _facts(part) for name, part in split.parts.items()})
    }


def split_from_table(table: pa.Table) -> Split:
    """The inverse, with empty paths.

    Raises:
        KeyError, TypeError, ValueError: the table is something else.
    """
    facts = json.loads((table.schema.metadata or {})[FACTS.encode()])
    rows = table.to_pylist()
    return Split(**{name: _part(facts[name], [row for row in rows if row["part"] == name]) for name in facts})


def _rows(name: str, part: Annotations) -> Iterator[dict[str, Any]]:
    for video in part.videos:
        yield _row(name, video) | {"published": False, "probabilities": None}
    naming = part.video_classes
    for video in naming.published.videos if naming is not None else ():
        assert naming is not None
        yield _row(name, video) | {
            "published": True,
            "probabilities": naming.probabilities[video.id].tolist(),
        }


def _row(name: str, video: Video) -> dict[str, Any]:
    return {
        "part": name,
        "video": video.id,
        "subset": video.subset,
        "duration_seconds": video.duration_seconds,
        "fps": video.fps,
        "frames": video.frames,
        "starts": video.segments_seconds[:, 0].tolist(),
        "ends": video.segments_seconds[:, 1].tolist(),
        "labels": video.labels.tolist(),
    }


def _facts(part: Annotations) -> dict[str, Any]:
    naming = part.video_classes
    published = None if naming is None else {"classes": naming.published.classes, "top": naming.top}
    return {"classes": part.classes, "published": published}


def _part(facts: dict[str, Any], rows: list[dict[str, Any]]) -> Annotations:
    videos = tuple(_video(row) for row in rows if not row["published"])
    naming = None
    if facts["published"] is not None:
        named = [row for row in rows if row["published"]]
        naming = VideoClasses(
            Annotations(tuple(facts["published"]["classes"]), tuple(_video(row) for row in named)),
            {row["video"]: np.array(row["probabilities"]) for row in named},
            facts["published"]["top"],
        )
    return Annotations(tuple(facts["classes"]), videos, naming)


def _video(row: dict[str, Any]) -> Video:
    return Video(
        id=row["video"],
        path="",
        subset=row["subset"],
        duration_seconds=row["duration_seconds"],
        fps=row["fps"],
        frames=row["frames"],
        segments_seconds=np.stack([row["starts"], row["ends"]], axis=1).reshape(-1, 2).astype(np.float64),
        labels=np.array(row["labels"], dtype=np.int32),
    )
