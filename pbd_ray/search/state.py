"""What is known in a run: the values that pass between controller, ledger and the steps.

Round 0 is the teacher, the uncompressed detector: it is evaluated and committed like a round, drops
nothing, and is the parent of round 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import pyarrow as pa

from pbd_ray.compression.blocks import UNDROPPED, Model, without_block
from pbd_ray.compression.candidates import CandidateScore, Criterion
from pbd_ray.compression.choice import Choice
from pbd_ray.config import UserError
from pbd_ray.metrics.guards import Guard
from pbd_ray.metrics.intervals import Verdict

__all__ = [
    "TEACHER_ROUND",
    "UNDROPPED",
    "AlignTask",
    "Alignment",
    "CandidateScore",
    "Choice",
    "Cost",
    "Criterion",
    "Decision",
    "Evaluation",
    "Feed",
    "Guard",
    "Interval",
    "Model",
    "RoundRecord",
    "Slice",
    "Steps",
    "Subset",
    "Summary",
    "SweepKind",
    "SweepTask",
    "Verdict",
    "Work",
    "without_block",
]

Subset = Literal["fit", "selection", "test"]
SweepKind = Literal["scores", "tie", "evaluation", "selection"]
"""Which sweep of a round, and the name of its folder."""

TEACHER_ROUND = 0


@dataclass(frozen=True)
class Slice:
    """Videos that one worker scores in one go; written once, in one file."""

    index: int
    videos: tuple[str, ...]
    stage: int = 0
    """Candidates may be stopped after a stage and are not scored in the next (racing)."""


@dataclass(frozen=True)
class Work:
    """A slice as it is handed out: with the candidates that were in the race then."""

    piece: Slice
    candidates: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SweepTask:
    """Score `model` less each of `candidates`, and `model` itself, on videos of a subset.

    An evaluation is a sweep with criterion 'map' and no candidates.
    """

    name: str
    """For logs and dashboards: unique within a run."""
    round: int
    model: Model
    candidates: tuple[int, ...]
    criterion: Criterion
    subset: Subset
    teacher: Model | None = None
    """Set where the criterion's loss has alignment terms."""

    def without_weights(self) -> SweepTask:
        """The task with empty models: what travels with every call while weights travel once."""
        return replace(self, model=Model(self.model.kept_blocks, {}), teacher=None)


@dataclass(frozen=True, eq=False)
class AlignTask:
    """Fine-tune `student` against `teacher` over the whole learning-rate grid."""

    round: int
    student: Model
    teacher: Model
    parent_result: str
    """Result hash of the round before, whether it stands or not: part of the names of fine-tuning runs, so
    that none is mistaken."""
    prior: float | None = None
    """Learning rate with which the model that lost the block was aligned."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """The chosen fine-tuning run."""

    learning_rate: float | None
    """None where nothing was trained."""
    epoch: int
    """Epochs trained up to the chosen one (the last epoch is the schedule's length)."""
    model: Model
    """Adapters merged, EMA weights."""
    curves: pa.Table
    """Losses and selection mAP of every run and epoch: only what is computed, for it is hashed."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Seconds, hosts, memory, retries: whatever differs between two equal runs. JSON values."""


@dataclass(frozen=True)
class Decision:
    """Which block a round drops and why."""

    round: int
    criterion: Criterion | Literal["given"]
    """given: by `scoring.drops`, without scores."""
    dropped_block: int
    kept_blocks: tuple[int, ...]
    """After the drop."""
    scores: tuple[CandidateScore, ...]
    tie: str | None
    """How a tie was broken, one sentence."""
    near: tuple[int, ...] = ()
    """Other blocks whose score is within `scoring.delta` of the dropped one's."""


@dataclass(frozen=True)
class Cost:
    """Computed cost of one window through the whole detector."""

    macs: int
    block_macs: int
    """Of the transformer blocks alone: these fall by the share of blocks that is dropped."""
    params: int


@dataclass(frozen=True)
class Interval:
    """Paired bootstrap interval over videos of a student's headline mAP minus the teacher's."""

    difference: float
    low: float
    high: float
    confidence: float
    videos: int
    unreliable: bool
    """Too few videos to decide on."""
    dropped_classes: int
    """(replicate, class) pairs where the drawn videos held no instance of the class: it left both means."""
    margin: float
    """How much worse than the teacher still counts as recovered; fixed in the recipe beforehand."""
    verdict: Verdict
    """holds: the interval lies above -margin; inferior: below; undecided: the data cannot tell."""


@dataclass(frozen=True)
class Evaluation:
    """A committed model's quality and computed cost."""

    kept_blocks: tuple[int, ...]
    map: Mapping[float, float]
    """By tIoU, on the test videos."""
    average_map: float
    headline_map: float
    """At `evaluation.headline_tiou`."""
    macs: int
    block_macs: int
    params: int
    interval: Interval | None
    """Against the teacher on the test videos; None for the teacher itself."""
    selection_interval: Interval | None = None
    """The same on the selection videos; only where `stopping.tolerance` asks for it."""
    guards: tuple[Guard, ...] = ()
    """On the selection videos too; only where `stopping.guardrails` asks for them."""


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """Everything of a committed round except weights and detections."""

    round: int
    parent: str
    result: str
    evaluation: Evaluation
    decision: Decision | None = None
    """None for the teacher, and so are the fields of fine-tuning."""
    learning_rate: float | None = None
    epoch: int | None = None
    curves: pa.Table | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Summary:
    """A run so far."""

    teacher: RoundRecord
    rounds: tuple[RoundRecord, ...]
    """All that are committed; which of them stand, `search/standing.py` says."""
    stop_reason: str | None
    bit_exact: bool
    """False once the run went on under other versions, threads or processors than it began with."""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """Videos that the run leaves out -> why."""


class Feed(Protocol):
    """Where a sweep's slices come from and where their rows go (`search/feed.py`); for one thread."""

    alive: tuple[int, ...]
    """Candidates that are still in the race."""

    @property
    def ended(self) -> bool:
        """Nothing is left to be scored; what is still being scored is not needed."""

    @property
    def planned(self) -> int:
        """Slices of all stages, scored or not."""

    @property
    def remaining(self) -> int:
        """Slices that are not scored, of all stages."""

    @property
    def seen(self) -> float:
        """Share of the videos that is scored."""

    def take(self) -> Work | None:
        """The next slice with the candidates that are in the race now, or None while none may be begun."""

    def put_back(self, work: Work) -> None:
        """A slice that was taken and will not be given: it is the next of its stage."""

    def give(self, work: Work, table: pa.Table) -> None:
        """The rows of a slice; of one given twice the second are thrown away."""

    def refuse(self, work: Work, error: UserError) -> None:
        """A slice that cannot be scored. Raises the error unless the sweep goes on without the slice."""


Sweep = Callable[[SweepTask, Feed], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Steps:
    """The expensive work, as plain callables: in this process or on a cluster."""

    sweep: Sweep
    """Score slices until the feed ends, in any order; give each one's table in the caller's process.
    May return measured facts (hosts, retries)."""
    align: Callable[[AlignTask], Alignment]
    latency: Callable[[Model], Mapping[str, float]]
    """Milliseconds of one window on a worker's resources."""
    scored: Callable[[SweepTask, Sequence[CandidateScore], bool], None] = lambda task, scores, final: None
    """Told the scores of a sweep with candidates at every barrier of a race, and, as final, at its end;
    for those who watch."""
