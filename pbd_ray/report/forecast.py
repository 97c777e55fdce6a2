"""What a run is expected to take: values, and as text (`jobs/compress.py --plan`).

`search/forecasting.py` computes them from what `search/profiling.py` measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from pbd_ray.config import Execution
from pbd_ray.report.plain import plain_text

_WIDTH = 110


@dataclass(frozen=True)
class Workload:
    """What a run works through, in windows as inference cuts them, with overlap."""

    fit: int
    scored: int
    """Of the fit videos that score."""
    scoring: int
    """What of them is put through all candidates: their windows, or one training window a video where the
    criterion is the training loss."""
    selection: int
    test: int
    epoch: int
    """Training windows: a video has one."""
    training_frames: float
    """Frames of a training window, as a multiple of those that a window of the fit videos decodes: what
    windows of inference share is decoded once."""


@dataclass(frozen=True)
class RunSeconds:
    """One fine-tuning run, beside as many others as will run at once."""

    start: float
    """What a run takes besides its epochs: workers that start, checkpoints, the end."""
    training: float
    """A training window."""
    selection: float
    """A window of a selection video."""
    peak_memory_bytes: int


@dataclass(frozen=True)
class UnitSeconds:
    """What was measured. A window's seconds are those of the pool: its workers share the windows."""

    workers: int
    runs_at_once: int
    start: float
    """Until a new pool has loaded its models."""
    load: float
    """Until a pool that is there has."""
    decode: float
    """What a window takes more where its frames are not in the cache."""
    window: float
    """A window through the uncompressed detector, its frames in the cache."""
    scoring: float
    """One of `Workload.scoring`, with every block of the uncompressed detector a candidate."""
    trials: float
    """What a sweep over candidates takes besides: their Tune trials start beside it and end after it."""
    latency: float
    align: RunSeconds | None
    """None where nothing is fine-tuned."""
    fit: RunSeconds | None
    """None where the teacher is given."""


@dataclass(frozen=True)
class StageForecast:
    """One stage of one round; hours are of what is held meanwhile, busy or not."""

    round: int
    """0: the teacher."""
    stage: str
    """As in measured.json."""
    seconds: float
    low: float
    high: float
    cpu_hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Forecast:
    """What is expected of a run whose every round stands, and the range it should lie in."""

    experiment: str
    """`config.experiment_hash`: another experiment's plan says nothing of this one."""
    resources: str
    """Of `resources_of`: nor does one for other workers."""
    workload: Workload
    units: UnitSeconds
    stages: tuple[StageForecast, ...]
    candidates: tuple[int, ...]
    """How many blocks each round scores; none where the recipe gives the drops."""
    rolled_back: int
    """Further rounds, if all are rolled back that can be: in `high` only."""
    uncached: float
    """Share of the decoded frames for which the cache has no room: decoded anew every time."""
    disk_bytes: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def low(self) -> float:
        return sum(stage.low for stage in self.stages)

    @property
    def high(self) -> float:
        rounds = max((stage.round for stage in self.stages), default=0)
        again = sum(stage.high for stage in self.stages if stage.round > 0) / max(1, rounds)
        return sum(stage.high for stage in self.stages) + self.rolled_back * again

    def seconds_of(self, round: int, stage: str) -> float | None:
        """What was expected of one stage; None where there was to be none."""
        found = (one.seconds for one in self.stages if (one.round, one.stage) == (round, stage))
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast_from_json(value: Mapping[str, Any]) -> Forecast:
    """Inverse of `Forecast.to_json`.

    Raises:
        TypeError, KeyError: it is something else.
    """
    units = dict(value["units"])
    for key in ("align", "fit"):
        units[key] = None if units[key] is None else RunSeconds(**units[key])
    parts = {
        "workload": Workload(**value["workload"]),
        "units": UnitSeconds(**units),
        "candidates": tuple(value["candidates"]),
        "stages": tuple(StageForecast(**stage) for stage in value["stages"]),
    }
    return Forecast(**{**value, **parts})


def forecast_text(plan: Forecast, execution: Execution) -> str:
    """Every stage, the whole with its range, and what it needs, for a terminal."""
    table = Table(box=None, pad_edge=False)
    for column in ("round", "stage", "time", "from", "to", "CPU hours", "GPU hours"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for one in plan.stages:
        table.add_row(
            "teacher" if one.round == 0 else str(one.round),
            one.stage,
            *(duration(value) for value in (one.seconds, one.low, one.high)),
            f"{one.cpu_hours:.3g}",
            f"{one.gpu_hours:.3g}",
        )
    cpus = sum(stage.cpu_hours for stage in plan.stages)
    gpus = sum(stage.gpu_hours for stage in plan.stages)
    whole = (duration(value) for value in (plan.seconds, plan.low, plan.high))
    table.add_row("all", "", *whole, f"{cpus:.3g}", f"{gpus:.3g}")
    return "\n".join([plain_text(table, _WIDTH), "", *_needs(plan, execution)])


def _needs(plan: Forecast, execution: Execution) -> list[str]:
    units, work = plan.units, plan.workload
    lines = [
        f"with {units.workers} scoring workers and {units.runs_at_once} fine-tuning runs at once; "
        f"windows: {work.selection} selection, {work.test} test, {work.epoch} an epoch"
    ]
    if plan.candidates:
        rounds = ", ".join(map(str, plan.candidates))
        lines.append(f"candidates: {rounds}, each on {work.scoring} windows a round if no race stops it")
    if plan.rolled_back:
        lines.append(f"'to' holds {plan.rolled_back} rounds more, if all are rolled back that can be")
    if plan.uncached:
        lines.append(
            f"{plan.uncached:.0%} of the decoded frames find no room in execution.cache_gigabytes="
            f"{execution.cache_gigabytes:g} and are decoded anew every time"
        )
    peaks = [run.peak_memory_bytes for run in (units.align, units.fit) if run is not None]
    if peaks:
        kind = "GPU memory" if execution.device == "cuda" else "memory"
        lines.append(f"{kind} of a fine-tuning worker: {max(peaks) / 1e9:.3g} GB")
    lines.append(f"disk: the run directory comes to {plan.disk_bytes / 1e9:.3g} GB at most")
    if (price := execution.price_per_device_hour) is not None:
        hours = device_hours(plan, execution)
        low, high = (hours * value / plan.seconds * price for value in (plan.low, plan.high))
        lines.append(f"cost: {hours * price:.3g} [{low:.3g}, {high:.3g}] at {price:g} {_unit(execution)}")
    return lines


def outcome_text(plan: Forecast, taken: Mapping[tuple[int, str], float]) -> str:
    """One line: what was planned and what it took.

    Args:
        taken: seconds by (round, stage), of `search_cost.whole_stages`; stages that only one side knows are
            left out.
    """
    both = [(one, taken[key]) for one in plan.stages if (key := (one.round, one.stage)) in taken]
    if not both:
        return "planned, but no stage went through in one go"
    planned = sum(one.seconds for one, _ in both)
    actual = sum(seconds for _, seconds in both)
    low, high = sum(one.low for one, _ in both), sum(one.high for one, _ in both)
    return (
        f"planned {duration(planned)} [{duration(low)}, {duration(high)}] for these stages, "
        f"they took {duration(actual)} ({actual / planned - 1:+.0%})"
    )


def resources_of(execution: Execution) -> str:
    """The workers that a plan is for."""
    each = f"{execution.cpus_per_worker:g} CPU, {execution.gpus_per_worker:g} GPU"
    return f"{execution.device}: {execution.max_workers} x ({each}), train_workers {execution.train_workers}"


def device_hours(plan: Forecast, execution: Execution, round: int | None = None) -> float:
    """Hours of GPUs that the run, or one round of it, holds; of CPUs where it runs on these."""
    stages = (stage for stage in plan.stages if round in (None, stage.round))
    return sum(stage.gpu_hours if execution.device == "cuda" else stage.cpu_hours for stage in stages)


def _unit(execution: Execution) -> str:
    return "a GPU hour" if execution.device == "cuda" else "a CPU hour"


def duration(seconds: float) -> str:
    """A time span for people: '45 s', '8.3 min', '12.5 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
