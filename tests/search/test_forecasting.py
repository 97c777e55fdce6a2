"""What a run is going to take, counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pbd_ray.config import load_recipe
from pbd_ray.report.forecast import (
    Forecast,
    RunSeconds,
    UnitSeconds,
    Workload,
    duration,
    forecast_from_json,
    forecast_text,
    outcome_text,
)
from pbd_ray.report.search_cost import whole_stages
from pbd_ray.search.forecasting import NARROW, RACED, WIDE, forecast, scoring_macs
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.state import Cost

WORK = Workload(fit=130, scored=100, scoring=100, selection=20, test=40, epoch=60, training_frames=1.5)
UNITS = UnitSeconds(
    workers=2, runs_at_once=2, start=8.0, load=1.0, decode=0.5, window=0.25, scoring=2.0, trials=3.0,
    latency=5.0, align=RunSeconds(start=10.0, training=0.5, selection=0.25, peak_memory_bytes=2_000_000_000),
    fit=None,
)  # fmt: skip
COST = Cost(macs=1000, block_macs=800, params=1)  # four blocks of 200


def planned(tiny_recipe: str, *overrides: str, units: UnitSeconds = UNITS, uncached: float = 0.0) -> Forecast:
    """Of the tiny recipe: four blocks, two drops, two learning rates, two epochs."""
    recipe = load_recipe(tiny_recipe, ["execution.cpus_per_worker=0.5", *overrides])
    return forecast(recipe, WORK, units, COST, rounds=2, uncached=uncached, disk_bytes=10**9)


def seconds(plan: Forecast) -> dict[tuple[int, str], float]:
    return {(stage.round, stage.stage): stage.seconds for stage in plan.stages}


def test_every_stage(tiny_recipe: str) -> None:
    # Forks of a window: 3, 2, 1, 0 blocks of 200 and the rest of 200 each; the student itself 1000.
    first, second = 1000 + (1200 + 4 * 200), 800 + (600 + 3 * 200)
    assert seconds(planned(tiny_recipe, "scoring.racing=off")) == pytest.approx(
        {
            (0, "evaluation"): 8 + 40 * (0.25 + 0.5),
            (0, "latency"): 5,
            (1, "scores"): 1 + 3 + 100 * (2.0 + 0.5),
            # 30 fit and 20 selection windows that nothing has decoded before, each by one worker alone.
            (1, "align"): 10 + 2 * 60 * 0.5 + 2 * 20 * 0.25 + 50 * 0.5 * 2,
            (1, "evaluation"): 8 + 40 * 0.25 * 800 / 1000,
            (1, "latency"): 5,
            (2, "scores"): 1 + 3 + 100 * 2.0 * second / first,
            (2, "align"): 10 + 2 * 60 * 0.5 * (3 * 600 + 1000) / (3 * 800 + 1000) + 2 * 20 * 0.25 * 600 / 800,
            (2, "evaluation"): 8 + 40 * 0.25 * 600 / 1000,
            (2, "latency"): 5,
        }
    )


def test_hours_and_range(tiny_recipe: str) -> None:
    plan = planned(tiny_recipe, "scoring.racing=off")
    scores = next(stage for stage in plan.stages if (stage.round, stage.stage) == (1, "scores"))
    assert scores.cpu_hours == pytest.approx(254 * 2 * 0.5 / 3600)
    align = next(stage for stage in plan.stages if (stage.round, stage.stage) == (1, "align"))
    assert align.cpu_hours == pytest.approx(2 * (60 + 10 + 50) * 0.5 / 3600)  # what epochs hold
    more = planned(tiny_recipe, "alignment.learning_rates=[1e-5,1e-4,1e-3]")
    align = next(stage for stage in more.stages if (stage.round, stage.stage) == (1, "align"))
    assert align.cpu_hours == pytest.approx((3 * (60 + 10) + 2 * 50) * 0.5 / 3600)  # the third finds a cache
    assert {stage.gpu_hours for stage in plan.stages} == {0}
    assert plan.low == pytest.approx(NARROW * plan.seconds)
    assert plan.high == pytest.approx(WIDE * plan.seconds)


def test_a_race_widens_the_range(tiny_recipe: str) -> None:
    raced, whole = (
        next(
            stage for stage in planned(tiny_recipe, f"scoring.racing={way}").stages if stage.stage == "scores"
        )
        for way in ("on", "off")
    )
    assert raced.high == whole.high
    assert raced.low == pytest.approx(NARROW * (4 + 250 * RACED))
    assert raced.low < raced.seconds < whole.seconds


def test_blocks_changes_take_no_forks(tiny_recipe: str) -> None:
    found = seconds(planned(tiny_recipe, "scoring.criterion=mse"))
    assert found[2, "scores"] == pytest.approx(4 + 100 * 2.0 * 800 / 1000)
    assert scoring_macs(3, COST, depth=4, fused=False) == 800


def test_given_drops_are_not_scored(tiny_recipe: str) -> None:
    assert not any(stage == "scores" for _, stage in seconds(planned(tiny_recipe, "scoring.drops=[1,2]")))


def test_without_fine_tuning(tiny_recipe: str) -> None:
    """The pool goes on from stage to stage: nothing starts anew."""
    found = seconds(planned(tiny_recipe, units=replace(UNITS, align=None)))
    assert not any(stage == "align" for _, stage in found)
    assert found[1, "evaluation"] == pytest.approx(1 + 40 * 0.25 * 800 / 1000)


def test_one_shot_is_aligned_once(tiny_recipe: str) -> None:
    found = seconds(planned(tiny_recipe, "alignment.rounds=last"))
    assert [round for round, stage in found if stage == "align"] == [2]


def test_more_learning_rates_than_run_at_once(tiny_recipe: str) -> None:
    """Those that wait read from the cache what the first have decoded."""
    plan = planned(tiny_recipe, "alignment.learning_rates=[1e-5,1e-4,1e-3]")
    assert seconds(plan)[1, "align"] == pytest.approx(2 * (10 + 60 + 10) + 50)


@pytest.mark.parametrize(("uncached", "decoding"), [(0.0, 50), (1.0, 120 * 1.5 + 40)])
def test_ranks_share_the_decoding(uncached: float, decoding: float, tiny_recipe: str) -> None:
    """Without a cache in two epochs twice 60 training windows and twice 20 selection windows."""
    plan = planned(tiny_recipe, "train_workers=2", uncached=uncached)
    assert seconds(plan)[1, "align"] == pytest.approx(10 + 60 + 10 + decoding * 0.5 * 2 / 2)
    align = next(stage for stage in plan.stages if (stage.round, stage.stage) == (1, "align"))
    assert align.cpu_hours == pytest.approx(2 * 2 * (60 + 10 + decoding / 2) * 0.5 / 3600)


def test_halving(tiny_recipe: str) -> None:
    """Four rates for one epoch, two for a second, one for the rest, whose rungs are no sweeps."""
    options = (
        "alignment.learning_rates=[1e-6,1e-5,1e-4,1e-3]",
        "alignment.halving=on",
        "alignment.optimizer={epochs: 8, schedule_epochs: 8, batch_size: 2}",
    )
    epoch = 60 * 0.5 + 20 * 0.25
    assert seconds(planned(tiny_recipe, *options))[1, "align"] == pytest.approx(
        2 * (10 + epoch) + 50 + (10 + epoch) + (10 + 6 * epoch)
    )


def test_fitting_the_teacher(tiny_recipe: str) -> None:
    """Two epochs of one run, all fit and selection videos decoded on the way."""
    fit = RunSeconds(start=20.0, training=1.0, selection=0.5, peak_memory_bytes=1)
    found = seconds(planned(tiny_recipe, units=replace(UNITS, fit=fit)))
    assert found[0, "fit"] == pytest.approx(20 + 2 * 60 * 1.0 + 2 * 20 * 0.5 + 150 * 0.5 * 2)
    assert found[1, "align"] == pytest.approx(10 + 60 + 10)  # nothing is decoded twice


def test_frames_without_room_are_decoded_every_time(tiny_recipe: str) -> None:
    cached, anew = (seconds(planned(tiny_recipe, "scoring.racing=off", uncached=u)) for u in (0.0, 0.5))
    more = {key: anew[key] - cached[key] for key in cached}
    assert more[0, "evaluation"] == more[1, "scores"] == 0  # decoded for the first time either way
    assert more[2, "scores"] == pytest.approx(100 * 0.25)
    assert more[1, "evaluation"] == pytest.approx(40 * 0.25)
    # Every frame of a training window, some of which two windows of inference share; the half that has room
    # among 30 fit and 20 selection windows is decoded once.
    assert more[2, "align"] == pytest.approx(2 * (60 * 1.5 + 20) * 0.5)
    assert more[1, "align"] == pytest.approx(2 * (60 * 1.5 + 20) * 0.5 - 50 * 0.5)


def test_training_at_another_size_decodes_anew(tiny_recipe: str) -> None:
    found = seconds(planned(tiny_recipe, "detector.grid.train_short_side_pixels=24"))
    assert found[1, "align"] == pytest.approx(10 + 60 + 10 + (130 + 20) * 0.5 * 2)


def test_the_training_loss_takes_one_window_a_video(tiny_recipe: str) -> None:
    """Whole videos are decoded for it, at the size of training."""
    recipe = load_recipe(tiny_recipe, ["scoring.criterion=train_loss", "scoring.racing=off"])
    work = replace(WORK, scoring=25)
    plan = forecast(recipe, work, UNITS, COST, rounds=2, uncached=0.0, disk_bytes=0)
    assert seconds(plan)[1, "scores"] == pytest.approx(4 + 25 * 2.0 + 100 * 0.5)
    assert seconds(plan)[1, "align"] == pytest.approx(10 + 60 + 10 + 50)
    plan = forecast(recipe, work, UNITS, COST, rounds=2, uncached=1.0, disk_bytes=0)
    assert seconds(plan)[1, "scores"] == pytest.approx(4 + 25 * 2.0 + 25 * 1.5 * 0.5)


def test_the_grid_narrows_from_round_to_round(tiny_recipe: str) -> None:
    rates = "alignment.learning_rates=[1e-6,1e-5,1e-4,1e-3,1e-2]"
    found = seconds(planned(tiny_recipe, rates, "alignment.prior_steps=1"))
    assert found[1, "align"] == pytest.approx(3 * (10 + 60 + 10) + 50)
    assert found[2, "align"] < 2 * (10 + 60 + 10)


def test_rounds_that_may_be_rolled_back(tiny_recipe: str) -> None:
    recipe = load_recipe(tiny_recipe, ["stopping.tolerance=0.01", "scoring.racing=off"])
    plan = forecast(recipe, WORK, UNITS, COST, rounds=4, uncached=0.0, disk_bytes=0)
    assert seconds(plan)[1, "selection"] == pytest.approx(1 + 20 * 0.25 * 800 / 1000)
    rounds = sum(stage.high for stage in plan.stages if stage.round > 0)
    assert plan.high == pytest.approx(sum(stage.high for stage in plan.stages) + 2 * rounds / 2)


def test_json(tiny_recipe: str) -> None:
    plan = planned(tiny_recipe)
    assert forecast_from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_text(tiny_recipe: str) -> None:
    recipe = load_recipe(tiny_recipe, ["price_per_device_hour=2"])
    plan = planned(tiny_recipe, "scoring.racing=off", uncached=0.25)
    lines = forecast_text(plan, recipe.execution).splitlines()
    assert lines[1].split() == ["teacher", "evaluation", "38", "s", "28", "s", "49", "s", "0.0106", "0"]
    told = "\n".join(lines)
    hours = sum(stage.cpu_hours for stage in plan.stages)
    assert f"cost: {2 * hours:.3g} [{2 * NARROW * hours:.3g}, {2 * WIDE * hours:.3g}] at 2 a CPU hour" in told
    assert "candidates: 4, 3, each on 100 windows" in told
    assert "memory of a fine-tuning worker: 2 GB" in told
    assert "25% of the decoded frames find no room in execution.cache_gigabytes=8" in told
    assert "cost" not in forecast_text(plan, load_recipe(tiny_recipe).execution)


def test_a_plan_of_another_experiment_says_nothing(tiny_recipe: str, tmp_path: Path) -> None:
    """Nor does one for other workers, nor one that an earlier version wrote of another experiment."""
    plan, recipe = planned(tiny_recipe), load_recipe(tiny_recipe, ["execution.cpus_per_worker=0.5"])
    ledger = Ledger.open(str(tmp_path), recipe)
    ledger.write_plan(plan)
    assert ledger.plan(recipe) == plan
    assert ledger.plan(load_recipe(tiny_recipe)) is None
    ledger.write_plan(replace(plan, experiment="0" * 64))
    assert ledger.plan(recipe) is None
    ledger.storage.write_json("plan/plan.json", {"experiment": "0" * 64, "resources": "", "units": {}})
    assert ledger.plan(recipe) is None


def test_outcome(tiny_recipe: str) -> None:
    """Stages that only one side knows are left out."""
    plan = planned(tiny_recipe)
    taken = {(0, "evaluation"): 38.0 * 1.1, (1, "tie"): 99.0}
    assert outcome_text(plan, taken) == "planned 38 s [28 s, 49 s] for these stages, they took 42 s (+10%)"
    assert outcome_text(plan, {}) == "planned, but no stage went through in one go"


def test_stages_that_went_through() -> None:
    """Not the last part of one that was interrupted, nor an alignment whose epochs were trained before."""
    whole, part = {"seconds": 9.0, "resumed": False}, {"seconds": 2.0, "resumed": True}
    align = {"seconds": 5.0, "resumed": True, "learning_rates": {"0.1": {"seconds": 30.0}}}
    stages = {"scores": part, "align": align, "evaluation": whole}
    assert whole_stages({0: {}, 1: {"stages": stages}}) == {(1, "evaluation"): 9.0}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (99.0, "99 s"), (100.0, "1.7 min"), (5999.0, "100.0 min"), (9000.0, "2.5 h")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
