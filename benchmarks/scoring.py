"""CPU time of a scoring round: the naive loop, fused scoring, fused scoring with racing, side by side.

    python benchmarks/scoring.py [--part tiny|videomae_s|workers|memory ...] [--json FILE]

The naive loop is what the paper's release does: every candidate and the undropped student in full, each
decoding every video anew. All ways run on the same windows and weights, the naive loop and the fused one in
turn, video by video; their rows must be equal bit for bit. One thread; CPU seconds (but for workers, which
are there to save wall time). The exit status is 1 if rows differ or a target is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import torch

from benchmarks.scoring_cases import (
    IDENTITY_BLOCK,
    Case,
    check_proposals,
    tiny,
    videomae_s,
    with_own_truth,
)
from benchmarks.scoring_machine import achieved, matmul_limit, peak_bytes
from benchmarks.scoring_rounds import Round, check_rows, decoding_once, naive_and_fused, swept

RELEASE_TINY = 51.0
"""CPU seconds of the paper's release on 75 windows and 5 candidates of the tiny model, on a 2-core Xeon."""
TWO_WORKER_VIDEOS = {"tiny": 25, "videomae_s": 4}
REPEATS = 3


@dataclass(frozen=True)
class Target:
    """A measured value and what it has to keep to."""

    what: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "at most" if self.at_most else "at least"
        return f"{'ok    ' if self.met else 'MISSED'} {self.what}: {self.value:.2f}, {sign} {self.bound:g}"


@dataclass(frozen=True)
class Part:
    """What a part of the benchmark found."""

    text: str
    facts: dict[str, Any]
    targets: tuple[Target, ...] = ()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    logging.getLogger("pbd_ray.metrics.mean_ap").setLevel(logging.ERROR)  # random weights leave classes out
    parts = {}
    with TemporaryDirectory() as directory:
        for name in arguments.part or PARTS:
            try:
                parts[name] = PARTS[name](Path(directory))
            except RuntimeError as difference:
                print(f"error: {difference}", file=sys.stderr)
                return 1
            print(parts[name].text, *parts[name].targets, sep="\n", end="\n\n", flush=True)
    targets = [target for part in parts.values() for target in part.targets]
    if arguments.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        document = {
            "machine": machine,
            "parts": {name: part.facts for name, part in parts.items()},
            "targets": [asdict(target) | {"met": target.met} for target in targets],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    missed = [str(target) for target in targets if not target.met]
    if missed:
        print("error: ", "; ".join(missed), file=sys.stderr)
    return 1 if missed else 0


def tiny_part(root: Path) -> Part:
    """The tiny model; its candidates tie, as random weights do, so racing has little to stop."""
    case = tiny(root)
    check_proposals(case)
    naive, fused, expected = naive_and_fused(case)
    whole, sweep = swept(case, raced=False)
    check_rows(case, expected, sweep)
    raced, _ = swept(case, raced=True)
    released = f"a whole round of the tiny model, CPU seconds (the paper's release: {RELEASE_TINY:g})"
    return _rounds_part(
        case, (naive, fused, whole, raced), (Target(released, whole.cpu_seconds, 10),), "near ties"
    )


def videomae_s_part(root: Path) -> Part:
    """The VideoMAE-S shape, with one block that does next to nothing and a truth that shows it."""
    case = with_own_truth(videomae_s(root))
    check_proposals(case)
    naive, fused, expected = naive_and_fused(case)
    raced, sweep = swept(case, raced=True)
    check_rows(case, expected, sweep)
    if sweep.stopped != set(case.student.kept_blocks) - {IDENTITY_BLOCK}:
        raise RuntimeError(f"{case.name}: racing stopped {sorted(sweep.stopped)}, not the clear losers")
    targets = (
        Target("fused over naive, VideoMAE-S shape", fused.cpu_seconds / naive.cpu_seconds, 0.60),
        Target("with racing, clear losers", raced.cpu_seconds / naive.cpu_seconds, 0.30),
    )
    return _rounds_part(case, (naive, fused, raced), targets, "clear losers")


def workers_part(root: Path) -> Part:
    """One worker on one core against two on two."""
    from benchmarks.scoring_workers import compare_workers  # Ray, which the other parts do without

    if len(os.sched_getaffinity(0)) < 2:
        return Part("workers: needs two cores, left out", {})
    cases = [(make(root), TWO_WORKER_VIDEOS[name]) for name, make in MODELS.items()]
    busy = os.getloadavg()[0]
    compared = compare_workers(cases, REPEATS)
    real = compared[list(MODELS).index("videomae_s")]
    lines = [
        "one worker on one core against two on two; wall seconds of each round (other work on the machine "
        f"spoils them: its load was {busy:.1f} before)"
    ]
    for found in compared:
        taken = "; ".join(
            f"{count}: {', '.join(f'{seconds:.1f}' for seconds in rounds)}"
            for count, rounds in found.seconds.items()
        )
        lines.append(f"  {found.case}, {found.videos} videos  {taken}  medians: x {found.speedup:.2f}")
    return Part(
        "\n".join(lines),
        {found.case: asdict(found) | {"speedup": found.speedup} for found in compared},
        # Not the tiny model: its windows take a tenth of a second, and Ray's own processes their share.
        (Target(f"two workers, {real.case}, times faster", real.speedup, 1.6, at_most=False),),
    )


def memory_part(root: Path) -> Part:
    """What a worker needs does not grow with the candidates: two token tensors are alive at a time."""
    case = videomae_s(root)
    lines = [
        f"{case.name}: resident MB of a process that has detected once, and its peak while it scores a video"
    ]
    facts = {}
    for count in (0, 1, len(case.student.kept_blocks)):
        before, peak = peak_bytes(root, count)
        note = ", as every pass of the naive loop" if count == 0 else ""
        lines.append(f"  {before / 1e6:6.0f}  {peak / 1e6:6.0f}  candidates: {count}{note}")
        facts[f"{count} candidates"] = {"before_bytes": before, "peak_bytes": peak}
    return Part("\n".join(lines), facts)


def _rounds_part(case: Case, rounds: Sequence[Round], targets: tuple[Target, ...], racing: str) -> Part:
    naive, fused, *others = rounds
    once = decoding_once(naive, arms=len(case.student.kept_blocks) + 1)
    rows = [naive, once, fused, *others]
    limit, rate = matmul_limit(case), achieved(case, fused)
    saved = others[-1].videos_saved
    videos = len(case.videos.videos)
    text = [
        f"{case.name}: {len(case.student.kept_blocks)} candidates, {videos} videos of "
        f"{case.windows_per_video} windows; CPU seconds of a round, racing among {racing}",
        table(rows),
        *(
            f"{row.what}: {row.measured_videos} of {videos} videos measured, and scaled"
            for row in (naive, fused)
            if row.measured_videos < videos
        ),
        "videos saved by racing: " + ", ".join(f"block {block}: {count}" for block, count in saved.items()),
        f"block forwards: {rate:.1f} of the {limit:.1f} GFLOP/s that torch.matmul reaches at their shapes "
        f"({rate / limit:.0%})",
    ]
    facts = {
        "rounds": [asdict(row) | {"ratio": row.cpu_seconds / naive.cpu_seconds} for row in rows],
        "matmul_gflops": limit,
        "block_gflops": rate,
    }
    return Part("\n".join(text), facts, targets)


def table(rows: Sequence[Round]) -> str:
    """Rounds line by line; `ratio` is to the first, `decode once` to the second where there is one."""
    width = max(len(row.what) for row in rows)
    stages = list(rows[0].stage_seconds)
    head = "".join(f"  {stage:>9}" for stage in stages)
    lines = [f"{'':{width}}    total  to naive  to once{head}  block forwards"]
    for row in rows:
        seconds = "".join(f"  {row.stage_seconds[stage]:9.2f}" for stage in stages)
        ratios = [row.cpu_seconds / rows[index].cpu_seconds for index in (0, 1)]
        lines.append(
            f"{row.what:{width}}  {row.cpu_seconds:7.2f}  {ratios[0]:8.2f}  {ratios[1]:7.2f}{seconds}"
            f"  {row.block_forwards:14d}"
        )
    return "\n".join(lines)


MODELS: dict[str, Callable[[Path], Case]] = {"tiny": tiny, "videomae_s": videomae_s}
PARTS: dict[str, Callable[[Path], Part]] = {
    "tiny": tiny_part,
    "videomae_s": videomae_s_part,
    "workers": workers_part,
    "memory": memory_part,
}

if __name__ == "__main__":
    sys.exit(main())
