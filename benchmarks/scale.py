"""How scoring a round scales to 1..256 workers: makespan against a lower bound, in simulated time.

    python benchmarks/scale.py [--videos N ...] [--measured FILE] [--json FILE] [--plot FILE]

The product plans the slices, races and hands out (`plan_race`, `plan_slices`, `SliceFeed`); only the seconds
of a slice and who is stopped are simulated. Costs are measured in the run, one thread, or read from an
earlier --json. The bound is the sum over stages of max(work / workers, longest video), also where workers
are slow or die. It holds for stages that follow one another: a run is below it where idle workers began the
next stage early. The exit status is 1 where a run at 64 workers, 200 videos and 12 blocks without trouble is
over 1.15 bounds, in any of ten sets of videos.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.scoring_costs import CLASSES, Costs, costs_of_depth, measured_costs
from benchmarks.simulated_cluster import Bounds, Candidates, Death, Workers, bounds, makespan
from pbd_ray.config import Execution, load_recipe
from pbd_ray.data.annotations import Annotations, Video
from pbd_ray.data.windows import inference_window_count
from pbd_ray.search.feed import Judge, SliceFeed
from pbd_ray.search.race import plan_race
from pbd_ray.search.slices import plan_slices, slice_count
from pbd_ray.search.state import Slice, Work

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BLOCKS = (12, 24, 40)
RACES: dict[str, Judge | None] = {
    "off": None,
    "ties": lambda stage, alive: alive,
    "losers": lambda stage, alive: alive[::2],
}
"""off: no race; ties: nobody is ever stopped; losers: half of the candidates at every barrier."""
TROUBLES = ("none", "stragglers", "deaths")
ALLOWED = 1.15

# Mean and standard deviation of the logarithm over THUMOS14's 200 training videos: of the seconds,
#   jq '[.database[] | select(.subset == "training") | .duration | log] |
#       (add / length) as $m | [$m, (map(. - $m | . * .) | add / length | sqrt)]' annotations.json
# and the same of `[.annotations[] | select(.label != "Ambiguous")] | length` instead of `.duration`.
DURATION_LOG, INSTANCES_LOG = (4.94, 0.917), (2.04, 1.18)
FPS = 30.0
SLICE_SECONDS = 0.5
"""The call, the table on its way and the file: what a slice costs beside its videos."""
START_SECONDS = 20.0
"""Process, imports and models of a worker."""
SLOW_SHARE, SLOWNESS = 0.1, 3.0
NODE_WORKERS, DEATHS, REPLACEMENT_SECONDS = 8, 2, 120.0


@dataclass(frozen=True)
class Case:
    workers: int
    videos: int
    blocks: int
    race: str
    trouble: str = "none"


@dataclass(frozen=True)
class Row:
    case: Case
    makespan_seconds: float
    bounds: Bounds
    speedup: float
    """Over one worker without trouble."""

    @property
    def ratio(self) -> float:
        return self.makespan_seconds / self.bounds.stages_seconds

    @property
    def idle_share(self) -> float:
        """Of the workers' time: spent neither on videos nor on candidates that count."""
        return 1 - self.bounds.work_seconds / (self.case.workers * self.makespan_seconds)


class VideoSet:
    """Videos drawn like THUMOS14's, one class each, and their plans of slices."""

    def __init__(self, count: int, seed: int) -> None:
        self._experiment = load_recipe("thumos14_videomae_s").experiment
        rng = np.random.default_rng((seed, count))
        self._videos = Annotations(
            tuple(str(label) for label in range(CLASSES)),
            tuple(_drawn_video(index, rng) for index in range(count)),
        )
        grid = self._experiment.detector.grid
        self._size = {v.id: (v.frames, inference_window_count(v, grid)) for v in self._videos.videos}
        self._plans: dict[tuple[int, bool], tuple[Slice, ...]] = {}

    def plan(self, workers: int, raced: bool) -> tuple[Slice, ...]:
        """What the product would plan for that many workers."""
        if (workers, raced) not in self._plans:
            count = slice_count(Execution(max_workers=workers))
            if raced:
                plan = plan_race(self._videos, self._experiment, round=1, count=count)
            else:
                plan = plan_slices(self._videos.videos, self._experiment.detector.grid, count)
            self._plans[workers, raced] = plan
        return self._plans[workers, raced]

    def seconds(self, costs: Costs, blocks: int, names: Sequence[str], candidates: Candidates) -> list[float]:
        """Of scoring each of the videos."""
        a_window = costs.window_seconds(blocks, candidates)
        sizes = (self._size[name] for name in names)
        return [frames * costs.decode_seconds + windows * a_window for frames, windows in sizes]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", metavar="N", type=int, nargs="+", default=[200, 10_000])
    parser.add_argument("--measured", metavar="FILE", type=Path, help="costs of an earlier --json")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--plot", metavar="FILE", type=Path, help="PNG, SVG or PDF, by its suffix")
    arguments = parser.parse_args()
    if arguments.measured:
        costs = Costs(**json.loads(arguments.measured.read_text())["costs"])
    else:
        costs = measured_costs()
    rows = [row for videos in arguments.videos for row in rows_of(VideoSet(videos, seed=0), videos, costs)]
    held = held_ratios(costs)
    print(table(rows))
    for race, ratios in held.items():
        print(
            f"64 workers, 200 videos, 12 blocks, race {race}: {min(ratios):.3f} to {max(ratios):.3f} bounds "
            f"in {len(ratios)} sets of videos"
        )
    if arguments.json:
        document = {"costs": asdict(costs), "rows": [row_to_json(row) for row in rows], "held": held}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.plot:
        draw(rows).savefig(arguments.plot, dpi=120)
    missed = [race for race, ratios in held.items() if max(ratios) > ALLOWED]
    if missed:
        print(f"error: over {ALLOWED} bounds: race {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def rows_of(videos: VideoSet, count: int, costs: Costs) -> list[Row]:
    """Every case on these videos."""
    rows = []
    for blocks, race in product(BLOCKS, RACES):
        alone = run(Case(1, count, blocks, race), videos, costs, even(1)).makespan_seconds
        for workers in WORKERS:
            case = Case(workers, count, blocks, race)
            found = [run(case, videos, costs, even(workers))]
            for trouble, pool in troubled(workers, found[0].makespan_seconds).items():
                found.append(run(replace(case, trouble=trouble), videos, costs, pool))
            rows += [replace(row, speedup=alone / row.makespan_seconds) for row in found]
    return rows


def held_ratios(costs: Costs) -> dict[str, list[float]]:
    """By race, makespan / bound at 64 workers, 200 videos and 12 blocks for ten sets of videos."""
    sets = [VideoSet(200, seed) for seed in range(10)]
    return {
        race: [run(Case(64, 200, 12, race), videos, costs, even(64)).ratio for videos in sets]
        for race in RACES
    }


def run(case: Case, videos: VideoSet, measured: Costs, workers: Workers) -> Row:
    """One sweep in simulated time; its speed-up is left at 1."""
    judge = RACES[case.race]
    plan = videos.plan(case.workers, raced=judge is not None)
    costs = costs_of_depth(measured, case.blocks)

    def video_seconds(names: Sequence[str], candidates: Candidates) -> list[float]:
        return videos.seconds(costs, case.blocks, names, candidates)

    def slice_seconds(work: Work) -> float:
        return sum(video_seconds(work.piece.videos, work.candidates)) + SLICE_SECONDS

    feed = SliceFeed(plan, tuple(range(case.blocks)), (), lambda work, table: None, judge)
    seconds = makespan(workers, feed, slice_seconds)
    return Row(case, seconds, bounds(plan, feed.raced, video_seconds, case.workers), speedup=1.0)


def even(workers: int) -> Workers:
    return Workers((1.0,) * workers, START_SECONDS, (), REPLACEMENT_SECONDS)


def troubled(workers: int, calm_seconds: float) -> dict[str, Workers]:
    """The same workers, a tenth of them slow (none of fewer than ten); and with nodes that die at some time
    in the seconds of a run without trouble."""
    calm, slow = even(workers), int(SLOW_SHARE * workers)
    rng = np.random.default_rng(workers)
    deaths = []
    for seconds in rng.uniform(0, calm_seconds, DEATHS):
        first = NODE_WORKERS * int(rng.integers(-(-workers // NODE_WORKERS)))
        deaths.append(Death(float(seconds), tuple(range(first, min(first + NODE_WORKERS, workers)))))
    slowness = (SLOWNESS,) * slow + (1.0,) * (workers - slow)
    return {"stragglers": replace(calm, slowness=slowness), "deaths": replace(calm, deaths=tuple(deaths))}


def table(rows: Sequence[Row]) -> str:
    """A line for each kind of run, a column for each number of workers."""
    lines = [
        f"{'videos':>6} {'blocks':>6}  {'race':6}  {'trouble':10}" + "".join(f"{w:>16}" for w in WORKERS)
    ]
    kinds: dict[Case, dict[int, Row]] = {}
    for row in rows:
        kinds.setdefault(replace(row.case, workers=0), {})[row.case.workers] = row
    for kind, found in kinds.items():
        cells = (found[workers] for workers in WORKERS)
        lines.append(
            f"{kind.videos:>6} {kind.blocks:>6}  {kind.race:6}  {kind.trouble:10}"
            + "".join(f"{row.ratio:8.2f}{row.speedup:4.0f}{row.idle_share:4.0%}" for row in cells)
        )
    note = "by workers: makespan / bound, speed-up over one worker, share of worker time idle or wasted"
    return "\n".join([*lines, note])


def row_to_json(row: Row) -> dict[str, object]:
    return {
        **asdict(row.case),
        "makespan_seconds": row.makespan_seconds,
        **asdict(row.bounds),
        "ratio": row.ratio,
        "speedup": row.speedup,
        "idle_share": row.idle_share,
    }


def draw(rows: Sequence[Row]) -> Figure:
    """Makespan (lines) against the bound (dotted): a row of panels for each number of videos, a column for
    each trouble, a colour for each race, a marker for each depth."""
    counts = sorted({row.case.videos for row in rows})
    figure = Figure(figsize=(15, 5 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), len(TROUBLES), sharex=True, sharey="row", squeeze=False)
    colours = dict(zip(RACES, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
    markers = dict(zip(BLOCKS, "osD", strict=True))
    for (i, videos), (j, trouble) in product(enumerate(counts), enumerate(TROUBLES)):
        axes = panels[i, j]
        for race, blocks in product(RACES, BLOCKS):
            line = [
                row for row in rows if replace(row.case, workers=0) == Case(0, videos, blocks, race, trouble)
            ]
            x = [row.case.workers for row in line]
            label = f"{blocks} blocks, race {race}"
            style = {"color": colours[race], "linewidth": 1}
            axes.plot(
                x, [row.makespan_seconds / 3600 for row in line], marker=markers[blocks], label=label, **style
            )
            axes.plot(x, [row.bounds.stages_seconds / 3600 for row in line], linestyle=":", **style)
        axes.set(xscale="log", yscale="log", title=f"{videos} videos, trouble: {trouble}", xlabel="workers")
        axes.set_xticks(WORKERS, [str(workers) for workers in WORKERS], minor=False)
        axes.grid(alpha=0.3)
        axes.set_ylabel("makespan, hours (dotted: bound)" if j == 0 else "")
    panels[0, 0].legend(fontsize="small", loc="lower left")
    return figure


def _drawn_video(index: int, rng: np.random.Generator) -> Video:
    seconds = float(np.exp(rng.normal(*DURATION_LOG)))
    instances = max(1, round(float(np.exp(rng.normal(*INSTANCES_LOG)))))
    frames = max(1, round(seconds * FPS))
    labels = np.full(instances, index % CLASSES, np.int32)
    return Video(f"v{index:05d}", "", "training", frames / FPS, FPS, frames, np.zeros((instances, 2)), labels)


if __name__ == "__main__":
    sys.exit(main())
