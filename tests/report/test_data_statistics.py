"""The table of a data set; its picture is only asked for being one, as its numbers are tested elsewhere."""

from __future__ import annotations

import numpy as np

from pbd_ray.data.annotations import Annotations, Video
from pbd_ray.data.statistics import Statistics, statistics_of
from pbd_ray.report.data_statistics import draw_statistics, statistics_text


def given(*classes: str) -> Statistics:
    """Class k has k + 1 instances; one video of 1000 s for training, an empty one of 500 s for testing."""
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), np.arange(1, len(classes) + 1))
    starts = np.arange(len(labels)) * 1.0
    segments = np.stack([starts, starts + np.linspace(0.1, 1, len(labels)) ** 2], axis=1)
    nothing = np.zeros((0, 2)), np.zeros(0, np.int32)
    videos = (
        Video("a", "a.mp4", "training", 1000.0, 10.0, 10000, segments, labels),
        Video("b", "b.mp4", "validation", 500.0, 10.0, 5000, *nothing),
    )
    return statistics_of(Annotations(classes, videos))


def test_the_table() -> None:
    rows = [line.split() for line in statistics_text(given("Run", "[Sit]")).splitlines()]
    assert ["training", "1", "3", "0.28", "0%"] in rows
    assert ["validation", "1", "0", "0.14", "0%"] in rows
    assert ["video,", "s", "500", "525", "750", "975", "1e+03"] in rows
    assert ["instances", "a", "video", "3", "3", "3", "3", "3"] in rows
    assert rows[-2:] == [["[Sit]", "2", "0"], ["Run", "1", "0"]]


def test_many_classes() -> None:
    """The most frequent ones, and how many there are beside them."""
    text = statistics_text(given(*(f"c{number}" for number in range(43))))
    assert "and 3 more classes" in text
    assert [word in text for word in ("c42 ", "c3 ", "c2 ")] == [True, True, False]


def test_the_picture() -> None:
    """Also of more classes than there is room for, and of names that are no text to a picture."""
    names = ("$x_{$", "走る", *(f"class {number}" for number in range(48)))
    for statistics in (given("Run"), given(*names)):
        assert draw_statistics(statistics).startswith(b"\x89PNG")
