"""Would racing have dropped the same block? Replays races over a run directory that was scored exhaustively.

    python jobs/compress.py RECIPE scoring.racing=off run_dir=RUN ...
    python benchmarks/racing.py RUN [--seeds 5] [--json FILE]

What a candidate detects in a video does not depend on which other candidates are alive, so the stored rows
are what a race would have seen. Every seed draws another order of the videos and other subsamples. For each
round and seed: the block that racing chooses, who was stopped when, and the share of (candidate, video) pairs
and of block forwards that were scored. Exit status 1 if a race chose a block whose score on all videos is
more than `scoring.delta` below the best.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.candidates import SweepRows, candidate_scores
from pbd_ray.compression.choice import choose_block
from pbd_ray.config import ConfigError, Experiment, RacingConfig, UserError
from pbd_ray.data.annotations import Annotations
from pbd_ray.data.source import load_split
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.race import judge, plan_race, videos_by_stage, videos_of_arms
from pbd_ray.search.slices import scoring_videos
from pbd_ray.search.state import Work


@dataclass(frozen=True)
class Race:
    """One replayed race."""

    round: int
    seed: int
    exhaustive: int
    """The block that all videos say."""
    chosen: int
    behind: float
    """How much lower the chosen block scores on all videos."""
    delta: float
    stopped: dict[int, list[int]]
    """Videos seen -> blocks stopped then."""
    videos: int
    of_videos: int
    """Videos seen when the race was over, of how many."""
    pair_share: float
    """(candidate, video) pairs scored, of all."""
    forward_share: float
    """Block forwards, fused, of those of exhaustive fused scoring; a video counts as one window."""
    cpu_seconds: float
    """What the race itself took: matching, subsamples, decisions."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 .. N-1 (default 5)")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    races: list[Race] = []
    try:
        for race in replays(arguments.run_dir, range(arguments.seeds)):
            races.append(race)
            print(describe(race), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    same = sum(race.chosen == race.exhaustive for race in races)
    near = sum(race.behind <= race.delta for race in races)
    print(f"{same} of {len(races)} races chose the block that all videos say, {near} one within delta of it")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(race) for race in races], indent=1) + "\n")
        print(arguments.json)
    return int(near < len(races))


def describe(race: Race) -> str:
    stops = "; ".join(f"after {seen}: {', '.join(map(str, who))}" for seen, who in race.stopped.items())
    return (
        f"round {race.round} seed {race.seed}: block {race.chosen} (all videos: {race.exhaustive}), "
        f"{race.videos} of {race.of_videos} videos, {race.pair_share:.0%} of pairs, "
        f"{race.forward_share:.0%} of block forwards, {race.cpu_seconds:.1f} CPU s; stopped {stops or 'none'}"
    )


def replays(run_dir: str, seeds: Sequence[int]) -> Iterator[Race]:
    """Every round of the run with every seed.

    Raises:
        UserError: not a run directory, or one that was scored with racing or by another criterion than map.
    """
    ledger = Ledger.existing(run_dir)
    recipe = ledger.recipe()
    scoring = recipe.experiment.scoring
    if scoring.racing is not None or scoring.criterion != "map":
        raise ConfigError(f"{run_dir}: not a run with scoring.racing=off and scoring.criterion=map")
    fit = load_split(recipe, print).fit
    videos = scoring_videos(fit, scoring.video_fraction, recipe.experiment.seed)
    number = 1
    while (folder := ledger.round(number)).begun():
        if folder.read_plan("scores") is not None:  # not that of a runner-up, which has no sweep of its own
            table = folder.read_slices("scores")
            for seed in seeds:
                yield replay(recipe.experiment, videos, number, table, seed)
        number += 1


def replay(experiment: Experiment, videos: Annotations, round: int, table: pa.Table, seed: int) -> Race:
    """Race over rows of all candidates on all `videos`, with the default settings and this seed."""
    everyone = sorted(set(table["candidate"].to_pylist()) | {UNDROPPED})
    blocks = tuple(block for block in everyone if block != UNDROPPED)
    whole = SweepRows("map", table, dict.fromkeys(everyone, tuple(sorted(v.id for v in videos.videos))))
    exact = candidate_scores(whole, experiment, videos)
    racing = experiment.scoring.model_copy(update={"racing": RacingConfig()})
    experiment = experiment.model_copy(update={"seed": seed, "scoring": racing})
    plan = plan_race(videos, experiment, round, len(videos.videos))
    seen = videos_by_stage(plan)
    stopped: dict[int, list[int]] = {}
    works: list[Work] = []

    def at_barrier(stage: int, alive: tuple[int, ...]) -> tuple[int, ...]:
        standing = SweepRows("map", table, dict.fromkeys(alive, seen[stage]))
        verdict = judge(standing, experiment, videos, round, stage, of=len(seen) - 1)
        if verdict.stopped:
            stopped[len(seen[stage])] = list(verdict.stopped)
        return tuple(block for block in alive if block not in verdict.stopped)

    begin = time.process_time()
    feed = SliceFeed(plan, blocks, (), lambda work, _: works.append(work), at_barrier)
    while (work := feed.take()) is not None:
        feed.give(work, table)
    cpu_seconds = time.process_time() - begin
    out = frozenset(blocks) - frozenset(feed.alive)
    raced = SweepRows("map", table, videos_of_arms(plan, feed.raced, blocks, undropped=True), out)
    chosen = choose_block(candidate_scores(raced, experiment, videos), experiment.scoring).block
    score = {entry.block: entry.score for entry in exact}
    return Race(
        round=round,
        seed=seed,
        exhaustive=choose_block(exact, experiment.scoring).block,
        chosen=chosen,
        behind=max(score[block] for block in blocks) - score[chosen],
        delta=experiment.scoring.delta,
        stopped=stopped,
        videos=len(works),
        of_videos=len(plan),
        pair_share=sum(len(work.candidates) for work in works) / (len(blocks) * len(plan)),
        forward_share=sum(_forwards(blocks, work.candidates) for work in works)
        / (_forwards(blocks, blocks) * len(plan)),
        cpu_seconds=cpu_seconds,
    )


def _forwards(blocks: Sequence[int], alive: Sequence[int]) -> int:
    """Block forwards of a window: the student, and for each candidate the blocks after it."""
    return len(blocks) + sum(sum(block > candidate for block in blocks) for candidate in alive)


if __name__ == "__main__":
    sys.exit(main())
