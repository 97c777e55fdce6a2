"""The search for a round's learning rate: which of the grid train, how far, and which one is chosen.

It knows nothing of how a run is trained: `search_rates` is handed a function that takes runs to an epoch,
in this process or on a cluster. The choice is by selection mAP only, so it depends on the recipe and the
data, never on which run ended first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import pyarrow as pa

from pbd_ray.compression.blocks import Model
from pbd_ray.compression.epochs import EpochReport, selection_rank
from pbd_ray.compression.finetune import Diverged, LossTerms
from pbd_ray.compression.schedule import rung_ends
from pbd_ray.config import AlignmentConfig
from pbd_ray.search.state import Alignment

Outcome = Literal["finished", "halved", "diverged"]

CURVES_SCHEMA = pa.schema(
    [
        ("learning_rate", pa.float64()),
        ("epoch", pa.int32()),
        *((name, pa.float64()) for name in LossTerms.__dataclass_fields__),
        ("selection_map", pa.float64()),
        ("selection_average_map", pa.float64()),
        ("outcome", pa.string()),
    ]
)
"""`outcome` is the run's: finished, halved (not among the better half at the end of a rung), diverged."""


@dataclass(frozen=True)
class GridRate:
    """A learning rate and its place in the recipe's grid, which seeds the random streams of its run."""

    index: int
    rate: float


@dataclass(frozen=True)
class RateRun:
    """The fine-tuning run of one learning rate, as far as it has come."""

    history: tuple[EpochReport, ...]
    diverged: str | None = None
    """Why it can not go on: a loss or a gradient that is not finite."""


Train = Callable[[Sequence[GridRate], int], Mapping[GridRate, RateRun]]
"""Take runs on to the end of so many epochs in all."""


def grid_of(config: AlignmentConfig, prior: float | None) -> tuple[GridRate, ...]:
    """The learning rates that a round tries.

    Args:
        prior: the one that the round before chose; None in the first.
    """
    rates = tuple(GridRate(index, rate) for index, rate in enumerate(config.learning_rates))
    steps = config.prior_steps
    if steps is None or prior not in config.learning_rates:
        return rates
    ranked = sorted(rates, key=lambda entry: entry.rate)
    place = [entry.rate for entry in ranked].index(prior)
    near = set(ranked[max(0, place - steps) : place + steps + 1])
    return tuple(entry for entry in rates if entry in near)


def search_rates(grid: Sequence[GridRate], config: AlignmentConfig, train: Train) -> dict[GridRate, RateRun]:
    """Train the grid, all of it or by successive halving (arXiv 1502.07943, algorithm 1).

    At the end of a rung the better half (rounded down, one at least) goes on; the schedule of every run
    spans all its epochs from the start. One that diverged does not go on.

    Raises:
        Diverged: all of the grid did.
    """
    runs: dict[GridRate, RateRun] = {}
    alive = tuple(grid)
    *rungs, last = rung_ends(config)
    for end in (*rungs, last):
        if end < last and len(alive) == 1:
            continue  # nothing to halve: on to the end
        found = train(alive, end)
        # A run that was interrupted may have come farther than this rung, and is judged as it was then.
        runs |= {entry: replace(run, history=run.history[:end]) for entry, run in found.items()}
        alive = tuple(entry for entry in alive if runs[entry].diverged is None)
        if end < last:
            ranked = sorted(alive, key=lambda entry: _preference(entry, runs[entry]))
            alive = tuple(sorted(ranked[: max(1, len(ranked) // 2)], key=lambda entry: entry.index))
        if not alive:
            break
    if all(run.diverged is not None for run in runs.values()):
        raise Diverged("; ".join(str(run.diverged) for run in runs.values()))
    return runs


def chosen_alignment(
    runs: Mapping[GridRate, RateRun], epochs: int, model_of: Callable[[GridRate], Model]
) -> Alignment:
    """What came of a grid.

    Args:
        epochs: of a finished run.
        model_of: the best model of a run, adapters merged.
    """
    chosen, epoch = choose_run(runs)
    return Alignment(
        learning_rate=chosen.rate,
        epoch=epoch + 1,
        model=model_of(chosen),
        curves=curves_table(runs, epochs),
        measured={
            "learning_rates": {
                f"{entry.rate:g}": {
                    "epochs": len(run.history),
                    "seconds": sum(report.cost.seconds for report in run.history),
                    "windows_per_second": [report.cost.windows_per_second for report in run.history],
                    "peak_memory_bytes": max((r.cost.peak_memory_bytes for r in run.history), default=None),
                    "diverged": run.diverged,
                }
                for entry, run in runs.items()
            }
        },
    )


def choose_run(runs: Mapping[GridRate, RateRun]) -> tuple[GridRate, int]:
    """(learning rate, epoch) with the best selection mAP among runs that did not diverge; ties: better
    average mAP, then the lower learning rate, then the earlier epoch."""
    candidates = [
        ((*selection_rank(report), -entry.rate, -report.epoch), entry, report.epoch)
        for entry, run in runs.items()
        if run.diverged is None
        for report in run.history
        if report.selection_map is not None
    ]
    _, entry, epoch = max(candidates, key=lambda candidate: candidate[0])
    return entry, epoch


def curves_table(runs: Mapping[GridRate, RateRun], epochs: int) -> pa.Table:
    """Every epoch of every run, without anything measured: it enters the round's hash.

    Args:
        epochs: after which a run is finished.
    """
    rows = [
        {
            "learning_rate": report.learning_rate,
            "epoch": report.epoch,
            **asdict(report.losses),
            "selection_map": report.selection_map,
            "selection_average_map": report.selection_average_map,
            "outcome": _outcome(run, epochs),
        }
        for run in runs.values()
        for report in run.history
    ]
    return pa.Table.from_pylist(rows, schema=CURVES_SCHEMA)


def _outcome(run: RateRun, epochs: int) -> Outcome:
    if run.diverged is not None:
        return "diverged"
    return "finished" if len(run.history) == epochs else "halved"


def _preference(entry: GridRate, run: RateRun) -> tuple[float, float, float]:
    """Sorts the preferred run first, by its best epoch so far."""
    best = max(selection_rank(report) for report in run.history)
    return (-best[0], -best[1], entry.rate)
