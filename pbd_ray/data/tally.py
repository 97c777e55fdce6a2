"""How long who computes waits for who decodes."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pbd_ray.data.dataset import WindowBatch


class Tally:
    """Windows of the batches that have passed, and the seconds until they came."""

    def __init__(self) -> None:
        self.windows = 0
        self.wait_seconds = 0.0

    def count(self, batches: Iterator[WindowBatch]) -> Iterator[WindowBatch]:
        """The same batches, counted as they are asked for."""
        return _Counted(self, batches)


class _Counted(Iterator[WindowBatch]):
    """No generator: that would hold on to a batch until the next one is asked for."""

    def __init__(self, tally: Tally, batches: Iterator[WindowBatch]) -> None:
        self._tally, self._batches = tally, batches

    def __next__(self) -> WindowBatch:
        asked = time.perf_counter()
        batch = next(self._batches)
        self._tally.wait_seconds += time.perf_counter() - asked
        self._tally.windows += len(batch.windows)
        return batch
