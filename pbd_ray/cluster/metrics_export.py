"""What a run tells Prometheus, through Ray: every metric with its unit.

`ROUND.set(2)` says it where the driver knows it. Outside `exporting` nothing is said: without Ray, in a test,
in another process. Ray puts `ray_` before a name and `_total` behind that of a counter.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

REFRESH_SECONDS = 5.0
"""Ray forgets a gauge that was not set for two of its report intervals, 20 s by default."""
_RUN = "run"
"""Label of all metrics: the run directory, which tells the runs of one cluster apart."""


@dataclass(frozen=True)
class Metric:
    """A number that a run tells."""

    name: str
    """Ends in the unit, where it has one."""
    meaning: str
    labels: tuple[str, ...] = ()
    """Each of few values: a learning rate, a stage, never a video or a slice."""


class Gauge(Metric):
    """A number as it is now."""

    def set(self, value: float, **labels: str) -> None:
        if _exporter is not None:
            _exporter.hold(self, value, labels)

    def clear(self) -> None:
        """Forget all values: those of a stage that has ended would be told for ever."""
        if _exporter is not None:
            _exporter.forget(self)


class Counter(Metric):
    """A sum since the driver's start."""

    def add(self, amount: float, **labels: str) -> None:
        if _exporter is not None:
            _exporter.add(self, amount, labels)


ROUND = Gauge("pbd_ray_round", "The round that is open; 0 is the teacher.")
STAGE_DONE = Gauge("pbd_ray_stage_done", "Share of the running stage that is done, 0 to 1.", ("stage",))
CANDIDATES_ALIVE = Gauge("pbd_ray_candidates_alive", "Candidate blocks that are still in the round's race.")
BEST_SCORE = Gauge(
    "pbd_ray_best_candidate_score",
    "Score of the best candidate so far: mAP (0 to 1), or the loss or squared error of that criterion.",
    ("criterion",),
)
UNDROPPED_SCORE = Gauge(
    "pbd_ray_undropped_score",
    "The same score of the student from which nothing is dropped, on the same videos.",
    ("criterion",),
)
SLICES_DONE = Gauge("pbd_ray_slices_done", "Slices of the running sweep that are scored.")
SLICES = Gauge("pbd_ray_slices", "Slices of the running sweep.")
WINDOWS_PER_SECOND = Gauge(
    "pbd_ray_windows_per_second",
    "Windows a second: of a sweep over all its workers since this driver began it, of a learning rate in its "
    "last epoch.",
    ("stage",),
)
TEST_MAP = Gauge(
    "pbd_ray_test_map",
    "Headline mAP on the test videos (0 to 1): of the teacher, and of the last round's model.",
    ("model",),
)
LOSS = Gauge("pbd_ray_loss", "Loss terms of a learning rate's last epoch.", ("learning_rate", "term"))
EPOCHS_DONE = Gauge("pbd_ray_epochs_done", "Epochs that a learning rate has behind it.", ("learning_rate",))
SELECTION_MAP = Gauge(
    "pbd_ray_selection_map",
    "Headline mAP on the selection videos (0 to 1) of a learning rate's last epoch.",
    ("learning_rate",),
)
QUARANTINED = Gauge("pbd_ray_quarantined_videos", "Videos that the run leaves out.")
DECODE_WAIT = Counter(
    "pbd_ray_decode_wait_seconds", "Seconds that workers waited for decoded windows.", ("stage",)
)
RETRIES = Counter("pbd_ray_retries", "Slices and learning rates that were begun again as their process died.")

METRICS: tuple[Metric, ...] = (
    ROUND,
    STAGE_DONE,
    CANDIDATES_ALIVE,
    BEST_SCORE,
    UNDROPPED_SCORE,
    SLICES_DONE,
    SLICES,
    WINDOWS_PER_SECOND,
    TEST_MAP,
    LOSS,
    EPOCHS_DONE,
    SELECTION_MAP,
    QUARANTINED,
    DECODE_WAIT,
    RETRIES,
)

_exporter: _Exporter | None = None


@contextlib.contextmanager
def exporting(run: str) -> Iterator[None]:
    """Tell Ray, which is connected, every metric until the context ends.

    Args:
        run: the run directory.
    """
    global _exporter
    exporter = _Exporter(run)
    refresher = threading.Thread(target=exporter.refresh, name="metrics", daemon=True)
    refresher.start()
    _exporter = exporter
    try:
        yield
    finally:
        _exporter = None
        exporter.ended.set()
        refresher.join()


class _Exporter:
    def __init__(self, run: str) -> None:
        from ray.util import (
            metrics,  # only here: jobs import this module before they have checked their input
        )

        self._run = run
        self._ray: dict[Metric, Any] = {}
        for metric in METRICS:
            kind = metrics.Gauge if isinstance(metric, Gauge) else metrics.Counter
            self._ray[metric] = kind(metric.name, metric.meaning, (_RUN, *metric.labels))
        self._held: dict[Gauge, dict[tuple[tuple[str, str], ...], float]] = {}
        self._lock = threading.Lock()
        self.ended = threading.Event()
        self.add(RETRIES, 0, {})

    def hold(self, gauge: Gauge, value: float, labels: dict[str, str]) -> None:
        with self._lock:
            self._held.setdefault(gauge, {})[tuple(labels.items())] = value
        self._tell(gauge, value, labels)

    def forget(self, gauge: Gauge) -> None:
        with self._lock:
            self._held.pop(gauge, None)

    def add(self, counter: Counter, amount: float, labels: dict[str, str]) -> None:
        self._tell(counter, amount, labels)

    def refresh(self) -> None:
        """The work of the thread."""
        while not self.ended.wait(REFRESH_SECONDS):
            with self._lock:
                held = [(gauge, dict(values)) for gauge, values in self._held.items()]
            for gauge, values in held:
                for labels, value in values.items():
                    self._tell(gauge, value, dict(labels))

    def _tell(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        # Not `inc`: it refuses 0, and a counter that is not there before its first event has no increase.
        self._ray[metric]._record(float(value), {_RUN: self._run, **labels})
