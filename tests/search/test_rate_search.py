"""Which learning rates train, how far, and which one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import pytest

from pbd_ray.compression.epochs import EpochCost, EpochReport
from pbd_ray.compression.finetune import Diverged, LossTerms
from pbd_ray.config import AlignmentConfig
from pbd_ray.search.rate_search import (
    CURVES_SCHEMA,
    GridRate,
    RateRun,
    choose_run,
    curves_table,
    grid_of,
    search_rates,
)

LOSSES = LossTerms(1.0, 2.0, 3.0, 4.0, 5.0, 15.0)
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def report(rate: float, epoch: int, quality: float | None, average: float | None) -> EpochReport:
    return EpochReport(epoch, rate, LOSSES, quality, average, False, EpochCost(1.0, 2.0, 3))


def config(epochs: int = 8, first: int | None = 1, rates: Sequence[float] = RATES) -> AlignmentConfig:
    return AlignmentConfig.model_validate(
        {
            "learning_rates": rates,
            "halving": None if first is None else {"first_epochs": first},
            "optimizer": {"epochs": epochs, "schedule_epochs": epochs},
        }
    )


@dataclass
class Scripted:
    """Runs whose selection mAP after every epoch is known; at an exclamation mark they diverge."""

    qualities: Mapping[float, Sequence[float | str]]
    trained: dict[GridRate, int] = field(default_factory=dict)
    rungs: list[tuple[tuple[float, ...], int]] = field(default_factory=list)

    def __call__(self, entries: Sequence[GridRate], until: int) -> dict[GridRate, RateRun]:
        self.rungs.append((tuple(entry.rate for entry in entries), until))
        return {entry: self._run(entry, until) for entry in entries}

    def _run(self, entry: GridRate, until: int) -> RateRun:
        done = max(until, self.trained.get(entry, 0))  # it may have come farther before an interruption
        values = self.qualities[entry.rate][:done]
        good = [value for value in values if isinstance(value, float)]
        history = tuple(report(entry.rate, epoch, value, value) for epoch, value in enumerate(good))
        self.trained[entry] = len(good)
        return RateRun(history, "loss nan" if len(good) < len(values) else None)

    @property
    def epochs(self) -> int:
        return sum(self.trained.values())


QUALITIES = {rate: [quality] * 8 for rate, quality in zip(RATES, (0.2, 0.5, 0.4, 0.3, 0.1), strict=True)}


def test_the_whole_grid_without_halving() -> None:
    train = Scripted(QUALITIES)
    runs = search_rates(grid_of(config(first=None), None), config(first=None), train)
    assert train.rungs == [(RATES, 8)] and train.epochs == 40
    assert choose_run(runs)[0].rate == 1e-4


def test_the_better_half_goes_on() -> None:
    """5, 2, 1 runs to the epochs 1, 2, 8: 13 epochs instead of 40, and the same learning rate."""
    train = Scripted(QUALITIES)
    runs = search_rates(grid_of(config(), None), config(), train)
    assert train.rungs == [(RATES, 1), ((1e-4, 1e-3), 2), ((1e-4,), 8)]
    assert train.epochs == 5 + 2 * 1 + 6
    assert choose_run(runs) == (GridRate(1, 1e-4), 0)
    assert [len(run.history) for run in runs.values()] == [1, 8, 2, 1, 1]


def test_a_run_is_judged_by_its_best_epoch_and_ties_by_the_lower_rate() -> None:
    qualities = {1e-5: [0.5, 0.1], 1e-4: [0.5, 0.1], 1e-3: [0.4, 0.9], 1e-2: [0.5, 0.5], 1e-1: [0.1, 0.1]}
    train = Scripted({rate: [*values, *[0.0] * 6] for rate, values in qualities.items()})
    search_rates(grid_of(config(), None), config(), train)
    assert [rates for rates, _ in train.rungs] == [RATES, (1e-5, 1e-4), (1e-5,)]


def test_resumed_in_a_later_rung() -> None:
    """Runs that have come farther are judged by what they were at the end of a rung."""
    qualities = {**QUALITIES, 1e-4: [0.5, *[0.45] * 7], 1e-3: [0.4, *[0.6] * 7], 1e-2: [0.1, *[0.9] * 7]}
    straight, again = Scripted(qualities), Scripted(qualities)
    again.trained = {GridRate(1, 1e-4): 2, GridRate(2, 1e-3): 4, GridRate(3, 1e-2): 8}
    ours, theirs = (search_rates(grid_of(config(), None), config(), t) for t in (again, straight))
    assert ours == theirs and again.rungs == straight.rungs == [(RATES, 1), ((1e-4, 1e-3), 2), ((1e-3,), 8)]


def test_one_that_diverged_does_not_go_on() -> None:
    qualities = {**QUALITIES, 1e-4: ["!"], 1e-2: [0.3, "!"]}
    train = Scripted(qualities)
    runs = search_rates(grid_of(config(), None), config(), train)
    assert train.rungs == [(RATES, 1), ((1e-3, 1e-2), 2), ((1e-3,), 8)]
    assert runs[GridRate(1, 1e-4)] == RateRun((), "loss nan")
    assert choose_run(runs)[0].rate == 1e-3


def test_where_all_that_went_on_diverged_the_best_of_the_others_is_taken() -> None:
    runs = search_rates(
        grid_of(config(), None), config(), Scripted({**QUALITIES, 1e-4: [0.5, "!"], 1e-3: [0.4, "!"]})
    )
    assert choose_run(runs) == (GridRate(3, 1e-2), 0)
    assert {run.diverged for run in runs.values()} == {None, "loss nan"}


def test_all_diverged() -> None:
    with pytest.raises(Diverged, match=r"^loss nan(; loss nan){4}$"):
        search_rates(grid_of(config(), None), config(), Scripted({rate: ["!"] for rate in RATES}))


@pytest.mark.parametrize(
    ("steps", "prior", "expected"),
    [
        (None, 1e-4, RATES),
        (1, None, RATES),
        (1, 1e-4, (1e-5, 1e-4, 1e-3)),
        (1, 1e-5, (1e-5, 1e-4)),
        (2, 1e-1, (1e-3, 1e-2, 1e-1)),
        (9, 1e-3, RATES),
        (1, 7e-4, RATES),
    ],
)
def test_prior(steps: int | None, prior: float | None, expected: tuple[float, ...]) -> None:
    """Around the rate of the round before, every rate in its own place of the grid, which seeds its run."""
    narrowed = grid_of(config().model_copy(update={"prior_steps": steps}), prior)
    assert tuple(entry.rate for entry in narrowed) == expected
    assert all(RATES[entry.index] == entry.rate for entry in narrowed)


def test_prior_in_an_unsorted_grid() -> None:
    grid = config(rates=(1e-3, 1e-5, 1e-4)).model_copy(update={"prior_steps": 1})
    assert grid_of(grid, 1e-5) == (GridRate(1, 1e-5), GridRate(2, 1e-4))


def run_of(*epochs: tuple[float, float | None, float | None]) -> tuple[float, RateRun]:
    rate = epochs[0][0]
    return rate, RateRun(tuple(report(rate, number, *rest) for number, (_, *rest) in enumerate(epochs)))


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        pytest.param(
            [run_of((1e-4, 0.1, 0.9), (1e-4, 0.3, 0.1)), run_of((1e-3, 0.2, 0.9))], (1e-4, 1), id="mAP"
        ),
        pytest.param([run_of((1e-4, 0.3, 0.1)), run_of((1e-3, 0.3, 0.2))], (1e-3, 0), id="then average mAP"),
        pytest.param(
            [run_of((1e-3, 0.3, 0.2)), run_of((1e-4, 0.3, 0.2))], (1e-4, 0), id="then the lower rate"
        ),
        pytest.param([run_of((1e-4, 0.3, 0.2), (1e-4, 0.3, 0.2))], (1e-4, 0), id="then the earlier epoch"),
        pytest.param(
            [run_of((1e-3, 0.3, 0.2)), run_of((1e-4, 0.1, 0.1), (1e-4, 0.3, 0.2))],
            (1e-4, 1),
            id="the rate before the epoch",
        ),
        pytest.param([run_of((1e-4, None, None), (1e-4, 0.0, 0.0))], (1e-4, 1), id="not measured"),
        pytest.param([run_of((1e-3, 0.0, 0.0)), run_of((1e-4, 0.0, 0.0))], (1e-4, 0), id="all zero"),
    ],
)
def test_choose_run(runs: list[tuple[float, RateRun]], expected: tuple[float, int]) -> None:
    entry, epoch = choose_run({GridRate(index, rate): run for index, (rate, run) in enumerate(runs)})
    assert (entry.rate, epoch) == expected


def test_curves() -> None:
    """Every epoch of every run, ended early or not; nothing measured, since the table is hashed."""
    runs = dict([run_of((1e-4, None, None), (1e-4, 0.5, 0.25)), run_of((1e-3, 0.5, 0.5))])
    runs[1e-2] = RateRun(run_of((1e-2, 0.0, 0.0))[1].history, "loss nan")
    table = curves_table({GridRate(i, rate): run for i, (rate, run) in enumerate(runs.items())}, epochs=2)
    assert table.schema == CURVES_SCHEMA
    assert not {"seconds", "windows_per_second", "peak_memory_bytes"} & set(table.column_names)
    assert table.to_pylist()[1] == {
        "learning_rate": 1e-4, "epoch": 1, **asdict(LOSSES),
        "selection_map": 0.5, "selection_average_map": 0.25, "outcome": "finished",
    }  # fmt: skip
    assert table["selection_map"].to_pylist() == [None, 0.5, 0.5, 0.0]
    assert table["outcome"].to_pylist() == ["finished", "finished", "halved", "diverged"]
