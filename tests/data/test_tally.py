"""What is counted of the batches that pass."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator

import pytest
import torch

from pbd_ray.data.dataset import WindowBatch
from pbd_ray.data.tally import Tally


def batch(windows: int) -> WindowBatch:
    nothing = torch.zeros(0)
    return WindowBatch(nothing, nothing, (), (), (None,) * windows)  # type: ignore[arg-type]


def decoded(seconds: float) -> Iterator[WindowBatch]:
    for windows in (4, 4, 1):
        time.sleep(seconds)
        yield batch(windows)


def test_windows_and_waits_of_all_videos() -> None:
    tally = Tally()
    for _ in range(2):
        for _ in tally.count(decoded(0.01)):
            time.sleep(0.02)  # compute is no wait
    assert tally.windows == 18
    assert 0.06 <= tally.wait_seconds < 0.12


def test_it_holds_on_to_no_batch() -> None:
    """Else two decoded batches would be in memory where one is."""
    batches = Tally().count(decoded(0.0))
    last = weakref.ref(next(batches))
    assert last() is None


def test_an_error_passes() -> None:
    def broken() -> Iterator[WindowBatch]:
        yield batch(1)
        raise OSError("no frame")

    batches = Tally().count(broken())
    next(batches)
    with pytest.raises(OSError, match="no frame"):
        next(batches)
