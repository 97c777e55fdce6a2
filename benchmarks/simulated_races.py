"""How often racing errs, and what it saves: races of simulated candidates whose exhaustive scores are known.

    python benchmarks/simulated_races.py [--races 400] [--json FILE]

Candidates find the same instances with the same luck, but for their skill and a twist of their own in every
video. A race errs where the best candidate left scores more than `scoring.delta` below the best of all on all
videos. Exit status 1 if it errs more often than the stated rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pbd_ray.compression.racing import barriers, beyond_doubt, map_lags
from pbd_ray.config import RacingConfig, ScoringConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA, GROUND_TRUTH_SCHEMA
from pbd_ray.metrics.mean_ap import Matches, match_detections, mean_ap_of, prepare_ground_truth

TIOU = 0.5
CLASSES = 2


@dataclass(frozen=True)
class Scenario:
    """What the candidates are like."""

    name: str
    skills: tuple[float, ...]
    """Log-odds of finding an instance of a video of average difficulty, one a candidate."""
    twist: float
    """Standard deviation of what a candidate's log-odds in a video have of their own."""
    videos: int = 60


SCENARIOS = (
    Scenario("near-ties", (1.0, 1.0, 1.02, 0.98, 1.0), 0.3),
    Scenario("near-ties, few videos", (1.0, 1.0, 1.02, 0.98, 1.0), 0.3, videos=24),
    Scenario("close", (1.0, 1.1, 0.9, 1.2, 1.15), 0.5),
    Scenario("close, unlike each other", (1.0, 1.1, 0.9, 1.2, 1.15), 1.5),
    Scenario("saturated, some losers", (2.5, 2.5, 2.6, 1.5, 0.5), 0.3),
    Scenario("clear losers", (1.2, -1.0, -0.5, -1.5, -1.2), 0.3),
)


@dataclass(frozen=True)
class Outcome:
    """Many races of one scenario."""

    scenario: str
    stated_rate: float
    races: int
    errors: int
    """Races in which what was left lies more than delta below the best of all."""
    not_best: int
    """Races in which the best of all, by however little, was stopped."""
    videos_share: float
    """Videos that candidates saw, of all, mean over candidates and races."""


class Detections:
    """Detections of simulated candidates in videos whose order is random already."""

    def __init__(
        self, rng: np.random.Generator, videos: int, skills: tuple[float, ...], twist: float
    ) -> None:
        self.names = tuple(f"v{index:03d}" for index in range(videos))
        counts = rng.integers(1, 5, size=videos)
        video = np.repeat(np.arange(videos), counts)
        names = pa.array(self.names).take(pa.array(video))
        start = np.concatenate([np.arange(count) * 10.0 for count in counts])
        label = rng.integers(0, CLASSES, size=len(video)).astype(np.int32)
        self.truth = pa.table([names, start, start + 5, label], schema=GROUND_TRUTH_SCHEMA)
        self.labels, self.videos = label, video
        ease, own = rng.normal(size=videos), rng.normal(size=(len(skills), videos))
        luck = rng.random((2, len(video)))
        self.arms: dict[int, pa.Table] = {}
        for block, skill in enumerate(skills):
            hit = luck[0] < 1 / (1 + np.exp(-(skill + ease + twist * own[block])))[video]
            # A miss is a detection that lies beside its instance; scores say little of which is which.
            shift, score = np.where(hit, 0.3, 4.0), 0.35 + 0.2 * hit + 0.3 * luck[1]
            columns = [names, start + shift, start + shift + 5, label, score]
            self.arms[block] = pa.table(columns, schema=DETECTION_SCHEMA)

    def matches(self, block: int, videos: tuple[str, ...]) -> Matches:
        truth = prepare_ground_truth(self.truth, CLASSES, videos)
        return match_detections(truth, self.arms[block], (TIOU,))

    def exhaustive(self, block: int) -> float:
        return mean_ap_of(self.matches(block, self.names)).map[TIOU]

    def instances(self) -> np.ndarray:
        """(V, C) instances of each class."""
        counts = np.bincount(self.videos * CLASSES + self.labels, minlength=len(self.names) * CLASSES)
        return counts.reshape(len(self.names), CLASSES)


def race(made: Detections, config: RacingConfig, seed: int) -> tuple[list[int], float]:
    """The candidates that are left, and the share of the videos that candidates saw."""
    cuts = barriers(made.instances(), config)
    alive, pairs, total = sorted(made.arms), 0, len(made.names)
    for barrier, (begin, cut) in enumerate(zip((0, *cuts), cuts, strict=False)):
        pairs += len(alive) * (cut - begin)
        arms = {block: made.matches(block, made.names[:cut]) for block in alive}
        lags = map_lags(arms, TIOU, total, np.random.default_rng((seed, barrier)), config.replicates)
        stopped = beyond_doubt(lags, config.error_rate / len(cuts))
        alive = [block for block in alive if block not in stopped]
        if len(alive) == 1:
            return alive, pairs / (len(made.arms) * total)
    pairs += len(alive) * (total - (cuts[-1] if cuts else 0))
    return alive, pairs / (len(made.arms) * total)


def simulate(scenario: Scenario, config: RacingConfig, delta: float, races: int) -> Outcome:
    """Races 0 .. races - 1 of a scenario, each with its own videos and candidates."""
    errors, not_best, shares = 0, 0, []
    for seed in range(races):
        made = Detections(np.random.default_rng(seed), scenario.videos, scenario.skills, scenario.twist)
        exact = [made.exhaustive(block) for block in made.arms]
        left, share = race(made, config, seed)
        behind = max(exact) - max(exact[block] for block in left)
        errors += behind > delta
        not_best += behind > 0
        shares.append(share)
    return Outcome(scenario.name, config.error_rate, races, errors, not_best, float(np.mean(shares)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--races", type=int, default=400, metavar="N", help="of every scenario (default 400)")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    config, delta = RacingConfig(), ScoringConfig().delta
    outcomes = []
    for scenario in SCENARIOS:
        found = simulate(scenario, config, delta, arguments.races)
        outcomes.append(found)
        print(
            f"{found.scenario}: {found.errors} of {found.races} races erred by more than {delta:g} "
            f"({found.errors / found.races:.2%}, stated {found.stated_rate:.0%}); the best was stopped in "
            f"{found.not_best}; candidates saw {found.videos_share:.0%} of the videos",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
        print(arguments.json)
    return int(any(outcome.errors > outcome.stated_rate * outcome.races for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
