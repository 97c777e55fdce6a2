"""What a run is going to take, stage by stage, from what a few windows took.

Every stage is its windows times what one was measured to take, times how much less there is to multiply than
in what was measured; plus starts of workers and trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pbd_ray.compression.jobs import teacher_config
from pbd_ray.compression.schedule import rung_ends
from pbd_ray.config import AlignmentConfig, Recipe, experiment_hash
from pbd_ray.report.forecast import (
    Forecast,
    RunSeconds,
    StageForecast,
    UnitSeconds,
    Workload,
    resources_of,
)
from pbd_ray.report.search_cost import TRAINING_FORWARDS
from pbd_ray.search.state import Cost

NARROW, WIDE = 0.75, 1.3
"""The range around what is expected, for what a few windows cannot show: other load on the machine, videos
that are busier than those looked at, workers that start late."""
RACED = 0.5
"""Share of a scoring sweep that is left where racing goes well (docs/scoring.md)."""


def forecast(
    recipe: Recipe,
    workload: Workload,
    units: UnitSeconds,
    cost: Cost,
    *,
    rounds: int,
    uncached: float,
    disk_bytes: int,
) -> Forecast:
    """Seconds and hours of every stage of a run.

    Args:
        cost: of the uncompressed detector.
        rounds: at most, those included that are rolled back.
        uncached, disk_bytes: as in `Forecast`.
    """
    experiment, blocks = recipe.experiment, recipe.experiment.detector.backbone.depth
    scored = range(experiment.max_drops) if experiment.scoring.drops is None else ()
    return Forecast(
        experiment=experiment_hash(experiment),
        resources=resources_of(recipe.execution),
        workload=workload,
        units=units,
        stages=tuple(_Stages(recipe, workload, units, cost, uncached).all()),
        candidates=tuple(blocks - dropped for dropped in scored),
        rolled_back=rounds - experiment.max_drops,
        uncached=uncached,
        disk_bytes=disk_bytes,
    )


def scoring_macs(blocks: int, cost: Cost, depth: int, fused: bool) -> float:
    """MACs of one window through a student of so many blocks, and, `fused`, through every fork of it
    (docs/scoring.md): the candidate at place i of n runs its n - 1 - i last blocks and the head."""
    block, rest = cost.block_macs / depth, cost.macs - cost.block_macs
    forks = sum(later * block + rest for later in range(blocks)) if fused else 0.0
    return blocks * block + rest + forks


@dataclass(frozen=True)
class _Stages:
    recipe: Recipe
    work: Workload
    units: UnitSeconds
    cost: Cost
    uncached: float
    decoded: dict[tuple[str, int], int] = field(default_factory=dict)
    """(part, side in pixels) -> windows whose frames an earlier stage has put into the cache."""

    def all(self) -> Iterator[StageForecast]:
        experiment, work, units = self.recipe.experiment, self.work, self.units
        judges = experiment.stopping.judges
        if units.fit is not None:
            yield self._fit(units.fit)
        yield self._evaluation(0, "evaluation", "test", work.test, units.start)
        yield self._pool(0, "latency", units.latency)
        if judges:
            yield self._evaluation(0, "selection", "selection", work.selection, units.load)
        for round in range(1, experiment.max_drops + 1):
            if experiment.scoring.drops is None:
                yield self._scores(round)
            start = units.load
            last = round == experiment.max_drops
            if units.align is not None and (last or experiment.alignment.rounds == "every"):
                yield self._align(round, units.align)
                start = units.start  # fine-tuning takes the pool's place
            yield self._evaluation(round, "evaluation", "test", work.test, start)
            yield self._pool(round, "latency", units.latency)
            if judges:
                yield self._evaluation(round, "selection", "selection", work.selection, units.load)

    def _evaluation(self, round: int, stage: str, part: str, windows: int, start: float) -> StageForecast:
        window = self.units.window * self._student(round) / self.cost.macs
        decoding = self.units.decode * (self._fresh(part, windows) + self.uncached * windows)
        return self._pool(round, stage, start + windows * window + decoding)

    def _scores(self, round: int) -> StageForecast:
        experiment, work, units = self.recipe.experiment, self.work, self.units
        depth, criterion = experiment.detector.backbone.depth, experiment.scoring.criterion
        fused = criterion != "mse"
        ours = scoring_macs(depth - round + 1, self.cost, depth, fused)
        share = ours / scoring_macs(depth, self.cost, depth, fused)
        part = "fit" if criterion == "train_loss" else "scored"
        most = work.scoring * units.scoring * share
        read = work.scoring * (work.training_frames if criterion == "train_loss" else 1)
        most += units.decode * (self._fresh(part, work.scored) + self.uncached * read)
        least = most * RACED if fused and experiment.scoring.racing is not None else most
        start = units.load + units.trials
        expected = self._pool(round, "scores", start + (most + least) / 2)
        return replace(expected, low=NARROW * (start + least), high=WIDE * (start + most))

    def _align(self, round: int, run: RunSeconds) -> StageForecast:
        """Measured on the student of round 1; a step is a forward and a backward pass of the student, and a
        forward of the teacher."""
        teacher, first, student = self.cost.macs, self._student(1), self._student(round)
        step = (TRAINING_FORWARDS * student + teacher) / (TRAINING_FORWARDS * first + teacher)
        run = replace(run, training=run.training * step, selection=run.selection * student / first)
        config = self.recipe.experiment.alignment_after(round)
        rates = len(config.learning_rates)
        if round > 1 and config.prior_steps is not None:
            rates = min(rates, 2 * config.prior_steps + 1)
        return self._runs(round, "align", config, rates, run)

    def _fit(self, run: RunSeconds) -> StageForecast:
        return self._runs(0, "fit", teacher_config(self.recipe.experiment.teacher), 1, run)

    def _runs(
        self, round: int, stage: str, config: AlignmentConfig, rates: int, run: RunSeconds
    ) -> StageForecast:
        """A grid, `runs_at_once` side by side, rung by rung as `rate_search.search_rates` takes them."""
        work, units = self.work, self.units
        chosen_on = "test" if self.recipe.experiment.paper_protocol else "selection"
        ranks = self.recipe.execution.train_workers
        decode = units.decode * units.workers / ranks  # every run decodes by itself, its ranks share
        *rungs, last = rung_ends(config)
        alive, begun, wall, held = rates, 0, 0.0, 0.0
        for end in (*rungs, last):
            if end < last and alive == 1:
                continue
            epochs = range(begun + 1, end + 1)
            selections = sum(epoch % config.select_every_epochs == 0 or epoch == end for epoch in epochs)
            trained, selected = len(epochs) * work.epoch, selections * work.selection
            seconds = trained * run.training + selected * run.selection
            seconds += decode * self.uncached * (trained * work.training_frames + selected)
            # Runs that wait for a place find in the cache what the first have decoded.
            first = decode * (self._fresh("fit", work.fit) + self._fresh(chosen_on, work.selection))
            wall += math.ceil(alive / units.runs_at_once) * (run.start + seconds) + first
            held += (alive * seconds + min(alive, units.runs_at_once) * first) * ranks
            alive, begun = max(1, alive // 2), end
        return self._stage(round, stage, wall, held)

    def _fresh(self, part: str, windows: int) -> float:
        """How many windows of a part are decoded into the cache now: those that nothing has read before, as
        far as there is room. What has none is decoded with every reading.

        Args:
            part: test, selection, fit (as training sees it) or scored (of the fit videos, as inference does).
        """
        grid, training = self.recipe.experiment.detector.grid, part == "fit"
        side = grid.train_short_side_pixels if training else grid.test_short_side_pixels
        key = ("fit" if part == "scored" else part, max(side, grid.crop_pixels))
        fresh = max(0, windows - self.decoded.get(key, 0))
        self.decoded[key] = self.decoded.get(key, 0) + fresh
        return (1 - self.uncached) * fresh

    def _pool(self, round: int, stage: str, seconds: float) -> StageForecast:
        return self._stage(round, stage, seconds, seconds * self.units.workers)

    def _stage(self, round: int, stage: str, seconds: float, held: float) -> StageForecast:
        execution = self.recipe.execution
        hours = (held * each / 3600 for each in (execution.cpus_per_worker, execution.gpus_per_worker))
        return StageForecast(round, stage, seconds, NARROW * seconds, WIDE * seconds, *hours)

    def _student(self, round: int) -> float:
        """MACs of the student that a round aligns; of round 0, the teacher's."""
        return self.cost.macs - round * self.cost.block_macs / self.recipe.experiment.detector.backbone.depth
