"""Racing against the formulas it states, and against exhaustive scoring of simulated candidates."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.simulated_races import SCENARIOS, Detections, Scenario, simulate
from pbd_ray.compression.racing import Lag, barriers, beyond_doubt, loss_lags, map_lags
from pbd_ray.config import RacingConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA
from pbd_ray.metrics.mean_ap import mean_average_precision

RACE = RacingConfig(error_rate=0.05)
DELTA = 0.005


@pytest.mark.parametrize(
    ("videos", "min_videos", "expected"),
    [
        (200, 20, (20, 40, 80, 160)),
        (33, 20, (20,)),
        (20, 20, ()),
        (12, 20, ()),
        (0, 20, ()),
        (1000, 20, (63, 126, 252, 504)),
        (48, 5, (5, 10, 20, 40)),
    ],
)
def test_barriers_double(videos: int, min_videos: int, expected: tuple[int, ...]) -> None:
    instances = np.full((videos, 2), 5)
    assert barriers(instances, RacingConfig(min_videos=min_videos)) == expected


@pytest.mark.parametrize(
    ("rare", "expected"),
    [
        ({0: 5}, (20, 40, 80)),
        ({30: 4, 31: 1}, (32, 64)),  # the fifth instance of the rare class is in the 32nd video
        ({30: 3}, (31, 62)),  # all there are
        ({10: 4, 99: 1}, ()),
    ],
)
def test_no_barrier_before_every_class_has_been_seen(rare: dict[int, int], expected: tuple[int, ...]) -> None:
    instances = np.stack([np.full(100, 3), np.zeros(100, dtype=np.int64)], axis=1)
    for video, count in rare.items():
        instances[video, 1] = count
    assert barriers(instances, RacingConfig(min_videos=20)) == expected


def lag(block: int, p_value: float, behind: float = 1.0) -> Lag:
    return Lag(block, behind, 1.0, p_value)


LEADER = lag(0, 1.0, behind=0.0)
HOLM_CASES: list[tuple[list[Lag], tuple[int, ...]]] = [
    ([LEADER], ()),
    ([LEADER, lag(1, 0.05)], (1,)),
    ([LEADER, lag(1, 0.051)], ()),
    # Holm's own steps of a family of three: 0.05 / 3, then 0.05 / 2, then 0.05.
    ([LEADER, lag(1, 0.016), lag(2, 0.024), lag(3, 0.049)], (1, 2, 3)),
    ([LEADER, lag(1, 0.016), lag(2, 0.026), lag(3, 0.030)], (1,)),
    ([LEADER, lag(1, 0.017), lag(2, 0.017), lag(3, 0.017)], ()),
    # A second leader: equal scores are not worse.
    ([LEADER, lag(1, 0.02), lag(2, 0.0, behind=0.0)], (1,)),
]


@pytest.mark.parametrize(("lags", "stopped"), HOLM_CASES)
def test_holm(lags: list[Lag], stopped: tuple[int, ...]) -> None:
    assert beyond_doubt(lags, 0.05) == stopped
    assert beyond_doubt(lags[::-1], 0.05) == stopped


def test_loss_lags_by_hand() -> None:
    """Paired differences 1, 2, 3: mean 2, deviation 1, standard error sqrt(1/3 - 1/12) of 3 of 12."""
    base = np.array([5.0, 1.0, 2.0])
    lags = loss_lags({4: base + np.array([1, 2, 3]), 1: base}, total_videos=12)
    assert [found.block for found in lags] == [1, 4]
    assert lags[0] == Lag(1, 0.0, 0.0, 1.0)
    assert (lags[1].behind, lags[1].standard_error) == (pytest.approx(2.0), pytest.approx(0.5))
    # All seen: no doubt is left, however small the difference.
    assert loss_lags({4: base + np.array([0, 0, 0.001]), 1: base}, total_videos=3)[1].p_value == 0.0


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [(1.0, 10, 0.1704), (2.086, 20, 0.025), (2.845, 20, 0.005), (3.850, 19, 0.00054), (2.601, 200, 0.005)],
)
def test_p_values_are_students(t: float, degrees: int, p: float) -> None:
    """Against printed tables of Student's t."""
    n, total = degrees + 1, 10**9
    pattern = np.linspace(-1, 1, n)
    pattern /= pattern.std(ddof=1) / math.sqrt(n)  # a standard error of 1
    found = loss_lags({0: np.zeros(n), 1: pattern + t}, total)[1]
    assert found.standard_error == pytest.approx(1.0, rel=1e-4)
    assert found.p_value == pytest.approx(p, rel=0.03)


def test_losses_that_are_not_numbers() -> None:
    """Such a candidate is stopped; where there are only such, nobody is."""
    fine, broken = np.array([1.0, 2.0, 3.0]), np.array([1.0, math.nan, math.inf])
    lags = loss_lags({0: broken, 1: fine}, 10)
    assert (lags[0].behind, lags[0].p_value) == (math.inf, 0.0)
    assert beyond_doubt(lags, 0.05) == (0,)
    assert beyond_doubt(loss_lags({0: broken, 1: broken}, 10), 0.05) == ()


def test_map_lags_against_whole_evaluations() -> None:
    """The lag is the difference of two evaluations; its error that of many, each of m of the n videos."""
    made = Detections(np.random.default_rng(0), 60, [0.5, 1.0, 1.2], twist=0.5)
    seen, total = made.names[:24], 60
    arms = {block: made.matches(block, seen) for block in made.arms}
    lags = map_lags(arms, 0.5, total, np.random.default_rng(1), replicates=4000)

    def score(block: int, videos: list[str]) -> float:
        return mean_average_precision(made.truth, made.arms[block], (0.5,), 2, videos=videos).map[0.5]

    values = [score(block, seen) for block in made.arms]
    leader = int(np.argmax(values))
    assert [found.behind for found in lags] == pytest.approx([values[leader] - value for value in values])
    # m = 24 * 60 / (120 - 24) = 15 of 24 vary as much as 24 of 60: 1/15 - 1/24 = 1/24 - 1/60.
    rng = np.random.default_rng(2)
    draws = [list(rng.choice(seen, size=15, replace=False)) for _ in range(300)]
    drawn = np.array([[score(block, videos) for block in made.arms] for videos in draws])
    expected = (drawn[:, [leader]] - drawn).std(axis=0)
    for block in made.arms:
        assert lags[block].standard_error == pytest.approx(expected[block], rel=0.15)
    assert lags[leader] == Lag(leader, 0.0, 0.0, 1.0)


def test_no_doubt_is_left_when_nearly_all_is_seen() -> None:
    made = Detections(np.random.default_rng(3), 40, [1.0, 1.05], twist=0.5)
    errors = []
    for cut in (10, 20, 39):
        arms = {block: made.matches(block, made.names[:cut]) for block in made.arms}
        errors.append(
            max(lag.standard_error for lag in map_lags(arms, 0.5, 40, np.random.default_rng(0), 400))
        )
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0] / 5


def test_one_video_that_differs_is_not_beyond_doubt() -> None:
    """It is in most subsamples: their tail would be certain, Student's is not."""
    made = Detections(np.random.default_rng(4), 40, [2.0, 2.0], twist=0.0)
    rows = made.arms[0].to_pylist()
    spoiled = [row | ({"start": 90.0, "end": 95.0} if row["video"] == "v003" else {}) for row in rows]
    made.arms[1] = pa.Table.from_pylist(spoiled, schema=DETECTION_SCHEMA)
    arms = {block: made.matches(block, made.names[:20]) for block in made.arms}
    worse = map_lags(arms, 0.5, 40, np.random.default_rng(0), 1000)[1]
    assert worse.behind > 0
    assert worse.p_value > 0.05


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_racing_by_map_errs_no_more_often_than_stated(scenario: Scenario) -> None:
    """How often what is left lies more than delta below the exhaustively best candidate."""
    found = simulate(scenario, RACE, delta=DELTA, races=100)
    assert found.errors <= RACE.error_rate * 100
    if "losers" in scenario.name:
        assert found.videos_share < 0.75


@pytest.mark.parametrize("gap", [0.0, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("skew", [False, True])
def test_racing_by_loss_errs_no_more_often_than_stated(gap: float, skew: bool) -> None:
    races, candidates, videos, errors, stopped = 500, 8, 100, 0, 0
    cuts = barriers(np.full((videos, 1), 5), RACE)
    assert cuts == (10, 20, 40, 80)
    rng = np.random.default_rng(0)
    for _ in range(races):
        noise = rng.normal(size=(candidates, videos))
        if skew:
            noise = np.exp(noise) - math.exp(0.5)
        losses = 0.3 * noise + rng.normal(size=videos) + gap * np.arange(candidates)[:, None]
        exact = losses.mean(axis=1)
        alive = list(range(candidates))
        for cut in cuts:
            lags = loss_lags({block: losses[block, :cut] for block in alive}, videos)
            alive = [b for b in alive if b not in beyond_doubt(lags, RACE.error_rate / len(cuts))]
        errors += bool(exact[alive].min() > exact.min() + DELTA)
        stopped += candidates - len(alive)
    assert errors <= RACE.error_rate * races
    if gap >= 0.1:
        assert stopped > 5 * races
