from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pbd_ray.data.annotations import Annotations, Split, Video
from pbd_ray.data.quarantine import (
    NOTHING,
    QuarantineError,
    quarantine,
    quarantine_from_json,
    quarantine_to_json,
)


def part(name: str, count: int) -> Annotations:
    nothing = np.zeros((0, 2)), np.zeros(0, np.int32)
    ids = [f"{name}_{index}" for index in range(count)]
    return Annotations(("a",), tuple(Video(id_, f"{id_}.mp4", name, 1.0, 1.0, 1, *nothing) for id_ in ids))


SPLIT = Split(part("fit", 20), part("selection", 4), part("test", 10))


def problems(*ids: str) -> dict[str, str]:
    return {id_: f"/v/{id_}.mp4: gone" for id_ in ids}


def test_left_out_of_every_part() -> None:
    found = quarantine(SPLIT, problems("test_9", "fit_3", "fit_0"), 0.1)
    assert list(found.reasons) == ["fit_0", "fit_3", "test_9"]
    assert found.shares == {"fit": 0.1, "selection": 0.0, "test": 0.1}
    left = found.without(SPLIT)
    ids = {video.id for video in left.everything().videos}
    assert ids == {video.id for video in SPLIT.everything().videos} - found.reasons.keys()
    assert [video.id for video in left.fit.videos[:3]] == ["fit_1", "fit_2", "fit_4"]


@pytest.mark.parametrize(
    ("bad", "most", "line"),
    [
        (
            ["fit_7", "fit_5"],
            0.05,
            "2 of 20 fit videos (10.0%) cannot be used, over experiment.data.max_quarantined=0.05; "
            "the first is /v/fit_5.mp4: gone",
        ),
        (
            ["test_1"],
            0.0,
            "1 of 10 test videos (10.0%) cannot be used, over experiment.data.max_quarantined=0; "
            "the first is /v/test_1.mp4: gone",
        ),
        (
            [f"selection_{index}" for index in range(4)],
            1.0,
            "4 of 4 selection videos (100.0%) cannot be used: none is left; "
            "the first is /v/selection_0.mp4: gone",
        ),
    ],
)
def test_too_many(bad: list[str], most: float, line: str) -> None:
    with pytest.raises(QuarantineError) as error:
        quarantine(SPLIT, problems(*bad), most)
    assert str(error.value) == line


def test_a_part_nobody_asked_for_may_be_empty() -> None:
    """An evaluation uses the test videos alone."""
    nothing = part("fit", 0)
    split = Split(nothing, nothing, SPLIT.test)
    assert quarantine(split, problems("test_1"), 0.1).reasons == problems("test_1")
    assert quarantine(split, {}, 0.0) == NOTHING


@pytest.mark.parametrize("bad", [(), ("fit_0", "test_9")])
def test_json_and_back(bad: tuple[str, ...]) -> None:
    found = quarantine(SPLIT, problems(*bad), 0.5)
    assert quarantine_from_json(quarantine_to_json(found)) == found


@pytest.mark.parametrize(
    "value", [None, [], {}, {"videos": []}, {"videos": {"a": 1}, "shares": {}}, {"videos": {}}]
)
def test_something_else(value: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        quarantine_from_json(value)
