"""From the directories of an ablation's runs to its tables.

A run that is not there (it failed, or has not been run yet) is left out of its rows; rows are compared over
the seeds that both have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from pbd_ray.config import Recipe
from pbd_ray.data.annotations import Annotations
from pbd_ray.metrics.cost import trainable_parameters
from pbd_ray.metrics.seed_intervals import CrossedBootstrap, Floats, SeedInterval, ordering
from pbd_ray.report.ablation import AblationRow, AblationTable
from pbd_ray.search.ablation import Run
from pbd_ray.search.ablation_tables import Row, TablePlan
from pbd_ray.search.evaluation import headline_matches
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.relu_swap import read_sparsity
from pbd_ray.search.state import TEACHER_ROUND


@dataclass(frozen=True, eq=False)
class RunResult:
    """What became of a run, up to one number of drops."""

    recipe: Recipe
    maps: Floats
    """Headline mAP on the test videos and under every draw of them: `CrossedBootstrap.maps`."""
    kept_blocks: tuple[int, ...]
    dropped: tuple[int, ...]
    learning_rates: tuple[float | None, ...]
    """Of each round."""
    sparsity: Mapping[str, Mapping[str, Any]] | None
    """`relu_swap.read_sparsity`."""


class RunReader:
    """Reads finished runs, each once.

    Args:
        base: from `ablation_recipe`.
        where: directory of a finished run; None where it is not finished.
        videos: the test videos.
    """

    def __init__(self, base: Recipe, where: Callable[[Run], str | None], videos: Annotations) -> None:
        self.rules = base.experiment.evaluation
        self.bootstrap = CrossedBootstrap(
            len(videos.videos), self.rules.bootstrap_replicates, self.rules.confidence, base.experiment.seed
        )
        self._where, self._videos = where, videos
        self._read: dict[tuple[str, int], RunResult | None] = {}

    def result(self, run: Run, drops: int) -> RunResult | None:
        """A run up to so many drops; None where it is not there."""
        key = (run.name, drops)
        if key not in self._read:
            place = self._where(run)
            self._read[key] = None if place is None else self._from(place, run, drops)
        return self._read[key]

    def _from(self, place: str, run: Run, drops: int) -> RunResult:
        ledger = Ledger.existing(place)
        swapped = run.arm.kind == "swapped"
        rounds = [
            ledger.round(number) for number in ([drops] if swapped else range(TEACHER_ROUND, drops + 1))
        ]
        matches = headline_matches(self._videos, rounds[-1].read_slices("evaluation"), self.rules)
        evaluation = rounds[-1].read_evaluation()
        assert evaluation is not None, f"{place} is finished"
        decisions = [folder.read_decision() for folder in rounds]
        alignments = [folder.read_alignment() for folder in rounds]
        return RunResult(
            recipe=ledger.recipe(),
            maps=self.bootstrap.maps(matches, self.rules.headline_tiou),
            kept_blocks=evaluation.kept_blocks,
            dropped=tuple(decision.dropped_block for decision in decisions if decision is not None),
            learning_rates=tuple(alignment[0] for alignment in alignments if alignment is not None),
            sparsity=read_sparsity(ledger.storage) if swapped else None,
        )


def ablation_table(plan: TablePlan, reader: RunReader) -> AblationTable:
    """The rows of a table, compared and judged."""
    results = {row.label: _results(plan, row, reader) for row in plan.rows}
    rows = []
    for row in plan.rows:
        interval = (
            None if row.against is None else _interval(results[row.against], results[row.label], reader)
        )
        rows.append(_row(plan, row, results[row.label], interval, reader))
    return AblationTable(plan.letter, plan.title, plan.note, reader.rules.confidence, tuple(rows))


def _results(plan: TablePlan, row: Row, reader: RunReader) -> dict[int, list[RunResult]]:
    """By seed, those that are there."""
    found: dict[int, list[RunResult]] = {}
    for seed, arms in zip(plan.seeds, row.arms, strict=True):
        results = [reader.result(Run(arm, seed), row.drops) for arm in arms]
        if there := [result for result in results if result is not None]:
            found[seed] = there
    return found


def _interval(
    reference: Mapping[int, list[RunResult]], row: Mapping[int, list[RunResult]], reader: RunReader
) -> SeedInterval | None:
    seeds = [seed for seed in reference if seed in row]
    if not seeds:
        return None
    first, second = ([_mean(arm[seed]) for seed in seeds] for arm in (reference, row))
    return reader.bootstrap.interval(first, second)


def _mean(results: Sequence[RunResult]) -> Floats:
    """Of the runs of one seed."""
    mean: Floats = np.stack([result.maps for result in results]).mean(axis=0)
    return mean


def _row(
    plan: TablePlan,
    row: Row,
    results: Mapping[int, list[RunResult]],
    interval: SeedInterval | None,
    reader: RunReader,
) -> AblationRow:
    runs = [result for seed in results.values() for result in seed]
    maps = [float(result.maps[0]) for result in runs]
    verdict = smallest = None
    if interval is not None and row.expected is not None:
        verdict = ordering(
            interval, reader.rules.noninferiority_margin if row.expected == "at least" else 0.0
        )
        smallest = interval.half_width if verdict == "undecided" else None
    zeros, negative, dtype = _sparsity(plan, row, reader)
    return AblationRow(
        table=plan.letter,
        row=row.label,
        drops=row.drops,
        runs=len(runs),
        seeds=len(results),
        map=fmean(maps) if maps else None,
        deviation=stdev(maps) if len(maps) > 1 else None,
        against=row.against,
        difference=None if interval is None else interval.value,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        unreliable=None if interval is None else interval.unreliable,
        expected=row.expected,
        verdict=verdict,
        smallest_seen=smallest,
        paper_map=row.paper,
        blocks="; ".join(_listed(result.dropped) for result in runs),
        learning_rates="; ".join(_listed(map(_rate, result.learning_rates)) for result in runs),
        trainable=_trainable(runs[0]) if plan.trainable and row.drops and runs else None,
        zeros=zeros,
        negative=negative,
        dtype=dtype,
    )


def _sparsity(plan: TablePlan, row: Row, reader: RunReader) -> tuple[float | None, float | None, str | None]:
    """Shares of zeros and of negative inputs, mean over seeds, and the dtype they were counted in."""
    if row.counted is None:
        return None, None, None
    runs = [
        Run(arm, seed)
        for other in plan.rows
        for seed, arms in zip(plan.seeds, other.arms, strict=True)
        for arm in arms
    ]
    swapped = [reader.result(run, row.drops) for run in runs if run.arm.kind == "swapped"]
    counts = [result.sparsity[row.counted] for result in swapped if result is not None and result.sparsity]
    if not counts:
        return None, None, None
    zeros, negative = (fmean(count[key] for count in counts) for key in ("zeros", "negative"))
    return zeros, negative, counts[0]["dtype"]


def _trainable(result: RunResult) -> int:
    experiment = result.recipe.experiment
    config, alignment = experiment.detector, experiment.alignment
    return trainable_parameters(config, result.kept_blocks, alignment.trainable, alignment.rank).total


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
