"""Tables from the directories of runs, against what the runs' own records say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from pbd_ray.config import Recipe
from pbd_ray.report.ablation import AblationRow, AblationTable
from pbd_ray.search.ablation import OURS, Run, ablation_recipe, run_recipe
from pbd_ray.search.ablation_results import RunReader, ablation_table
from pbd_ray.search.ablation_tables import TablePlan, plan_tables, runs_of
from pbd_ray.search.evaluation import headline_matches
from pbd_ray.search.ledger import Ledger

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def base(make_recipe: Callable[..., Recipe]) -> Recipe:
    return ablation_recipe(make_recipe())


@pytest.fixture(scope="module")
def plans(base: Recipe) -> dict[str, TablePlan]:
    return {plan.letter: plan for plan in plan_tables(base, ["A", "B", "E", "F"], SEEDS)}


@pytest.fixture(scope="module")
def arms(
    base: Recipe,
    plans: dict[str, TablePlan],
    make_world: Callable[..., object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Every run but full fine-tuning with seed 1, which failed. A run's seed moves its weights a little."""
    folder = tmp_path_factory.mktemp("arms")
    for run in runs_of(list(plans.values())):
        if run.name != "full-seed1":
            recipe = run_recipe(base, run, str(folder / run.name), (1, 3))
            make_world(recipe=recipe, lift=1.1 + 0.02 * run.seed).run(recipe.run_dir)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def reader(base: Recipe, arms: Path, make_world: Callable[..., object]) -> RunReader:
    def where(run: Run) -> str | None:
        return str(arms / run.name) if (arms / run.name).is_dir() else None

    return RunReader(base, where, make_world().split.test)  # type: ignore[attr-defined]


def maps(arms: Path, arm: str, drops: int, seeds: tuple[int, ...] = SEEDS) -> list[float]:
    """As the runs' own evaluations have it."""
    found = [
        Ledger.existing(str(arms / f"{arm}-seed{seed}")).round(drops).read_evaluation() for seed in seeds
    ]
    return [evaluation.headline_map for evaluation in found if evaluation is not None]


def row(table: AblationTable, label: str) -> AblationRow:
    (found,) = (row for row in table.rows if row.row.startswith(label))
    return found


def test_order_and_rates(plans: dict[str, TablePlan], reader: RunReader, arms: Path) -> None:
    table = ablation_table(plans["A"], reader)
    first, second = row(table, "round 1"), row(table, "round 2")
    assert (first.blocks, first.learning_rates) == ("1; 1; 1", "0.0001; 0.0001; 0.0001")
    assert (second.blocks, second.learning_rates.partition(";")[0]) == ("1, 3; 1, 3; 1, 3", "0.0001, 0.0001")
    assert (second.map, second.deviation) == pytest.approx(
        (fmean(maps(arms, "ours", 2)), stdev(maps(arms, "ours", 2))), abs=1e-12
    )
    assert (second.runs, second.seeds, second.verdict) == (3, 3, None)
    assert (first.paper_map, row(table, "uncompressed").paper_map) == (None, None)  # of another depth


def test_fine_tuning_against_none(plans: dict[str, TablePlan], reader: RunReader, arms: Path) -> None:
    table = ablation_table(plans["E"], reader)
    for drops in (1, 2):
        found = row(table, f"not, {drops} dropped, same order")
        pairs = zip(maps(arms, "ours", drops), maps(arms, "none-same-order", drops), strict=True)
        lead = fmean(ours - none for ours, none in pairs)
        assert lead > 0
        assert found.difference == pytest.approx(lead, abs=1e-12)
        assert found.low is not None and found.high is not None
        assert found.low <= lead <= found.high
        assert found.verdict == ("holds" if found.low > 0 else "undecided")
        assert found.smallest_seen == (None if found.low > 0 else pytest.approx((found.high - found.low) / 2))
        assert found.unreliable, "six videos"
        assert found.learning_rates == "; ".join([", ".join(["-"] * drops)] * 3)


def test_random_sets_are_averaged_within_a_seed(
    plans: dict[str, TablePlan], reader: RunReader, arms: Path
) -> None:
    found = row(ablation_table(plans["B"], reader), "one-shot, 5 random sets")
    by_seed = [
        [maps(arms, arm.name, 2, (seed,))[0] for arm in drawn]
        for seed, drawn in zip(SEEDS, plans["B"].rows[-1].arms, strict=True)
    ]
    every = [value for values in by_seed for value in values]
    assert (found.runs, found.seeds) == (15, 3)
    assert (found.map, found.deviation) == pytest.approx((fmean(every), stdev(every)), abs=1e-12)
    leads = [ours - fmean(values) for ours, values in zip(maps(arms, "ours", 2), by_seed, strict=True)]
    assert found.difference == pytest.approx(fmean(leads), abs=1e-12)


def test_a_run_that_failed_is_left_out(plans: dict[str, TablePlan], reader: RunReader, arms: Path) -> None:
    found = row(ablation_table(plans["F"], reader), "full")
    there = (0, 2)
    leads = np.subtract(maps(arms, "ours", 2, there), maps(arms, "full", 2, there))
    assert (found.runs, found.seeds) == (2, 2)
    assert found.difference == pytest.approx(leads.mean(), abs=1e-12)
    assert found.verdict == "holds", "equal is at least as good"
    assert found.trainable == 2 * (4 * 384 * 384 + 3 * 384 + 8 * 384 * 384 + 5 * 384 + 4 * 384) + 590208


def test_a_table_without_a_run(plans: dict[str, TablePlan], base: Recipe, reader: RunReader) -> None:
    nothing = RunReader(base, lambda run: None, reader._videos)
    found = row(ablation_table(plans["E"], nothing), "not, 1 dropped, same order")
    assert (found.runs, found.map, found.difference, found.verdict, found.blocks) == (0, None, None, None, "")


def test_replicates_weigh_the_test_videos(base: Recipe, reader: RunReader, arms: Path) -> None:
    """Row 0 of the draws is the test set itself."""
    ours = reader.result(Run(OURS, 0), 1)
    assert ours is not None
    assert ours.maps[0] == pytest.approx(maps(arms, "ours", 1, (0,))[0], abs=1e-12)
    assert ours.maps.shape == (1 + base.experiment.evaluation.bootstrap_replicates,)
    assert (ours.kept_blocks, ours.dropped) == ((0, 2, 3), (1,))
    slices = Ledger.existing(str(arms / "ours-seed0")).round(1).read_slices("evaluation")
    rules = base.experiment.evaluation
    assert np.isfinite(reader.bootstrap.maps(headline_matches(reader._videos, slices, rules), 0.5)).all()
