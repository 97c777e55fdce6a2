"""The record of a run's videos: it says what was annotated, and notices when it no longer does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pbd_ray.data.annotations import Annotations, Split
from pbd_ray.data.video_classes import VideoClasses
from pbd_ray.search.annotated import NAME, recorded_split, split_from_table, split_hash, split_to_table
from pbd_ray.search.ledger import Ledger, LedgerError
from pbd_ray.search.verify import verify


@pytest.fixture
def split(make_videos: Callable[..., Annotations]) -> Split:
    """The test part detected class-agnostic; of its published videos one is no longer in the part."""
    published = make_videos("test", 4, 3)
    agnostic = tuple(replace(v, labels=np.zeros_like(v.labels)) for v in published.videos[1:])
    probabilities = {v.id: np.array([0.25, 0.75]) for v in published.videos}
    test = Annotations(("action",), agnostic, VideoClasses(published, probabilities, 2))
    empty = Annotations(published.classes, ())
    return Split(fit=make_videos("fit", 3, 1), selection=empty, test=test)


def test_round_trip(split: Split) -> None:
    table, facts = split_to_table(split)
    back = split_from_table(table.replace_schema_metadata(facts))
    assert split_hash(back) == split_hash(split)
    for name, part in split.parts.items():
        mine = back.parts[name]
        assert mine.classes == part.classes
        assert [v.id for v in mine.videos] == [v.id for v in part.videos]
        assert mine.ground_truth().equals(part.ground_truth())
    naming = back.test.video_classes
    assert naming is not None
    assert naming.top == 2
    assert naming.published.classes == ("jump", "run")


def changed(path: Path) -> None:
    table = pq.read_table(path)
    longer = [value + 1 for value in table["duration_seconds"].to_pylist()]
    pq.write_table(table.set_column(4, "duration_seconds", [longer]), path)


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (changed, "not the videos that the run began with"),
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(b"PAR1"), "not valid Parquet"),
        (lambda path: pq.write_table(pq.read_table(path).drop("fps"), path), "not a record of videos: 'fps'"),
    ],
)
def test_an_altered_record(
    tmp_path: Path, make_world: Callable[..., Any], alter: Callable[[Path], Any], problem: str
) -> None:
    """Named by whoever reads it; the next start makes it anew."""
    world = make_world()
    world.run(str(tmp_path))
    assert split_hash(recorded_split(Ledger.existing(str(tmp_path)))) == split_hash(world.split)
    whole = (tmp_path / NAME).read_bytes()
    alter(tmp_path / NAME)
    with pytest.raises(LedgerError, match=problem) as error:
        recorded_split(Ledger.existing(str(tmp_path)))
    assert verify(str(tmp_path)) == [str(error.value)]
    world.run(str(tmp_path))
    assert (tmp_path / NAME).read_bytes() == whole
