"""Simulated makespans are those that a pencil gives, no schedule is quicker than the floor, and the script
runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import scale
from benchmarks.scoring_costs import Costs, costs_of_depth
from benchmarks.simulated_cluster import Death, Workers, bounds, makespan
from pbd_ray.compression.scoring import fused_outputs
from pbd_ray.search.feed import SliceFeed
from pbd_ray.search.state import Slice, Work

COSTS = Costs(decode_seconds=0.0003, embed_seconds=1.4, block_seconds=2.5, head_seconds=0.5)


@dataclass(frozen=True)
class Sweep:
    """A video a slice; a video takes its seconds times the candidates, or once without any."""

    stages: tuple[tuple[float, ...], ...]
    workers: Workers
    candidates: int = 0
    kept: int | None = None
    """Candidates that go on at every barrier; None: no judge."""

    def plan(self) -> tuple[Slice, ...]:
        found: list[Slice] = []
        for stage, videos in enumerate(self.stages):
            for video in videos:
                found.append(Slice(len(found), (f"{len(found)}:{video}",), stage))
        return tuple(found)

    def seconds(self, names, candidates) -> list[float]:
        return [float(name.split(":")[1]) * max(1, len(candidates)) for name in names]

    def feed(self) -> SliceFeed:
        judge = None if self.kept is None else lambda stage, alive: alive[: self.kept]
        return SliceFeed(self.plan(), tuple(range(self.candidates)), (), lambda work, table: None, judge)

    def makespan(self, feed: SliceFeed | None = None) -> float:
        def seconds(work: Work) -> float:
            return sum(self.seconds(work.piece.videos, work.candidates))

        return makespan(self.workers, feed or self.feed(), seconds)


def even(workers: int, **others) -> Workers:
    return Workers((1.0,) * workers, **others)


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        pytest.param(Sweep(((3, 2, 2),), even(1)), 7, id="one worker: the sum"),
        pytest.param(Sweep(((3, 2, 2),), even(2)), 4, id="two: 3 beside 2 + 2"),
        pytest.param(Sweep(((3, 2, 2),), even(9)), 3, id="more workers than slices: the longest"),
        pytest.param(Sweep(((3, 2, 2),), even(2, start_seconds=5)), 9, id="start"),
        pytest.param(Sweep(((3, 2, 2),), Workers((3.0, 1.0))), 9, id="the slow one has the longest"),
        pytest.param(Sweep(((2,), (3,)), even(1), 3, 2), 12, id="barrier: 2 x 3, then 3 x 2"),
        pytest.param(Sweep(((2,), (3,)), even(2), 3, 2), 9, id="the idle begin the next stage, with all 3"),
        pytest.param(Sweep(((2, 1), (3,)), even(2), 3, 2), 12, id="begun at 3 with 3, done at 12"),
        pytest.param(Sweep(((2,), (3,)), even(2), 3, 1), 6, id="one left: what was begun is not waited for"),
        pytest.param(
            # Starts at 1, is dead at 2; the next one is loaded at 2 + 3 + 1.
            Sweep(((5,),), even(1, start_seconds=1, deaths=(Death(2, (0,)),), replacement_seconds=3)),
            11,
            id="a death: all again",
        ),
        pytest.param(
            Sweep(((5,),), even(1, start_seconds=1, deaths=(Death(0.5, (0,)),), replacement_seconds=3)),
            9.5,
            id="a death while it starts",
        ),
        pytest.param(
            # Worker 1 ends 1 at 1 and 2 at 3, when it finds the 4 that worker 0 left at 2.
            Sweep(((4, 1, 2),), even(2, deaths=(Death(2, (0,)),), replacement_seconds=9)),
            7,
            id="a death: another one takes it",
        ),
        pytest.param(
            Sweep(((4, 4),), even(2, deaths=(Death(1, (0, 1)),), replacement_seconds=2)),
            7,
            id="a node of two",
        ),
        pytest.param(
            # At 4 worker 2 takes one of the two 9s, and is done at 13; the idle worker 1 died at 2, and the
            # next one takes the other at 12.
            Sweep(
                ((9, 1, 4, 9),),
                even(4, deaths=(Death(2, (1,)), Death(3, (0, 3))), replacement_seconds=10),
            ),
            21,
            id="death of an idle one",
        ),
        pytest.param(Sweep(((4,), (1,), (1,)), even(2), 3, 2), 14, id="not the one after it"),
        pytest.param(Sweep(((4,),), even(1, deaths=(Death(1, (5,)),))), 4, id="a node without workers"),
    ],
)
def test_makespan_by_hand(sweep: Sweep, expected: float) -> None:
    assert sweep.makespan() == expected


def test_bounds_by_hand() -> None:
    sweep = Sweep(((4, 1, 1), (1, 1, 1)), even(2), 4, 2)
    found = bounds(sweep.plan(), ((0, 1, 2, 3), (0, 1)), sweep.seconds, workers=2)
    assert found.stages_seconds == max(24 / 2, 16) + max(6 / 2, 2)
    assert found.floor_seconds == max(30 / 2, 16)
    assert found.work_seconds == 30


@dataclass(frozen=True)
class Drawn:
    """A random sweep and who was in which of its stages."""

    seed: int
    sweep: Sweep = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        stages = [tuple(np.sort(rng.exponential(9, rng.integers(1, 30)))[::-1].tolist()) for _ in range(4)]
        workers = int(rng.integers(1, 20))
        deaths = [Death(float(t), tuple(range(4))) for t in rng.uniform(0, 40, rng.integers(3))]
        pool = Workers(
            tuple(rng.choice([1.0, 3.0], workers).tolist()), float(rng.uniform(0, 3)), tuple(deaths), 5.0
        )
        sweep = Sweep(tuple(stages), pool, 6, (None, 6, 3, 1)[self.seed % 4])
        object.__setattr__(self, "sweep", sweep)


@pytest.mark.parametrize("seed", range(40))
def test_never_quicker_than_the_floor_and_the_same_again(seed: int) -> None:
    sweep = Drawn(seed).sweep
    feed = sweep.feed()
    seconds = sweep.makespan(feed)
    found = bounds(sweep.plan(), feed.raced, sweep.seconds, len(sweep.workers.slowness))
    assert seconds >= found.floor_seconds * (1 - 1e-12)
    assert Drawn(seed).sweep.makespan() == seconds
    calm = replace(sweep, stages=sweep.stages[:1], workers=even(len(sweep.workers.slowness)))
    # Graham (1966): nobody is idle while a slice waits.
    times = calm.seconds([piece.videos[0] for piece in calm.plan()], range(6))
    share = 1 / len(calm.workers.slowness)
    assert calm.makespan() <= sum(times) * share + max(times) * (1 - share) + 1e-9
    alone = replace(sweep, workers=even(1), kept=None)
    assert alone.makespan() == pytest.approx(
        bounds(alone.plan(), [range(6)] * 4, alone.seconds, 1).work_seconds
    )


@pytest.mark.parametrize("candidates", [range(5), (0, 3), (4,), ()])
def test_forwards_are_those_of_fused_scoring(candidates) -> None:
    calls = {"embed": 0, "block": 0, "head": 0}

    class Counting:
        kept_blocks = tuple(range(5))
        backbone = property(lambda self: self)

        def embed(self, frames):
            calls["embed"] += 1
            return torch.zeros(1)

        def run_block(self, block, tokens):
            calls["block"] += 1
            return tokens

        def head_output(self, tokens, mask, outputs):
            calls["head"] += 1

    class Batch:
        frames = mask = None

    list(fused_outputs(Counting(), Batch(), tuple(candidates)))
    costs = Costs(0.0, embed_seconds=1.0, block_seconds=100.0, head_seconds=10_000.0)
    expected = calls["embed"] + 100 * calls["block"] + 10_000 * calls["head"]
    assert costs.window_seconds(5, candidates) == expected


def test_deeper_is_dearer_by_its_width() -> None:
    assert costs_of_depth(COSTS, 12) == COSTS
    large = costs_of_depth(COSTS, 24)
    tokens, small_dim, large_dim = 8 * 100, 384, 1024
    macs = [12 * dim**2 + 2 * tokens * dim for dim in (small_dim, large_dim)]
    assert large.block_seconds == pytest.approx(COSTS.block_seconds * macs[1] / macs[0])
    assert large.decode_seconds == COSTS.decode_seconds


def test_videos_are_like_thumos14() -> None:
    """The release's 200 training videos: 209 s and 15 instances on average."""
    drawn = scale.VideoSet(2000, seed=0)
    videos = drawn._videos.videos
    assert np.mean([video.duration_seconds for video in videos]) == pytest.approx(209, rel=0.1)
    assert np.mean([len(video.labels) for video in videos]) == pytest.approx(15, rel=0.1)
    assert drawn.plan(8, raced=True) == scale.VideoSet(2000, seed=0).plan(8, raced=True)
    assert drawn.plan(8, raced=True) != scale.VideoSet(2000, seed=1).plan(8, raced=True)


@pytest.mark.parametrize(("allowed", "status"), [(1.15, 0), (0.5, 1)])
def test_status(
    allowed: float,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """64 workers on 200 videos stay within 15 % of the bound."""
    measured = tmp_path / "costs.json"
    measured.write_text(json.dumps({"costs": COSTS.__dict__}))
    monkeypatch.setattr(scale, "ALLOWED", allowed)
    monkeypatch.setattr(sys, "argv", ["scale.py", "--videos", "20", "--measured", str(measured)])
    assert scale.main() == status
    assert ("error: over 0.5 bounds: race off" in capsys.readouterr().err) == bool(status)


@pytest.mark.slow
def test_script(tmp_path: Path) -> None:
    output, plot = tmp_path / "out.json", tmp_path / "out.png"
    script = Path(scale.__file__)
    command = [sys.executable, str(script), "--videos", "200", "--json", str(output), "--plot", str(plot)]
    done = subprocess.run(command, cwd=script.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    assert all(seconds > 0 for seconds in document["costs"].values())
    rows = document["rows"]
    assert len(rows) == len(scale.WORKERS) * len(scale.BLOCKS) * len(scale.RACES) * len(scale.TROUBLES)
    assert all(row["makespan_seconds"] >= row["floor_seconds"] for row in rows)
    assert len(done.stdout.splitlines()) == 1 + len(rows) // len(scale.WORKERS) + 1 + len(scale.RACES)
    assert plot.read_bytes().startswith(b"\x89PNG")
