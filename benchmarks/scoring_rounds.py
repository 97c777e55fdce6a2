"""A scoring round done three ways (naive loop, fused, raced), and what its CPU time goes into."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.scoring_cases import CPU, ROUND, Case
from pbd_ray.compression import scoring
from pbd_ray.compression.blocks import UNDROPPED, without_block
from pbd_ray.compression.candidates import SweepRows, candidate_scores
from pbd_ray.compression.scoring import CANDIDATE_DETECTION_SCHEMA, detect_video, score_videos
from pbd_ray.data.annotations import Split, Video
from pbd_ray.data.source import inference_batches
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.videomae import VideoMAE
from pbd_ray.search import race
from pbd_ray.search.in_process import in_process_steps
from pbd_ray.search.round_folder import RoundFolder
from pbd_ray.search.state import SweepTask
from pbd_ray.search.storage import Storage
from pbd_ray.search.sweeping import Sweeper

DECODE, EMBEDDING, BLOCKS, HEAD, NMS, MAP = "decode", "embedding", "blocks", "head", "NMS", "mAP"
WATCHED: tuple[tuple[Any, str, str], ...] = (
    (VideoMAE, "embed", EMBEDDING),
    (VideoMAE, "run_block", BLOCKS),
    (Detector, "head_output", HEAD),
    (scoring, "decode", NMS),
    (scoring, "detections_of_proposals", NMS),
    (race, "standings", MAP),
)
"""Where the stages of a round are entered."""


@dataclass(frozen=True)
class Round:
    """CPU seconds of a scoring round over all videos of a case."""

    what: str
    cpu_seconds: float
    stage_seconds: dict[str, float]
    """They add up to `cpu_seconds`; `rest` is what no stage accounts for."""
    block_forwards: int
    """Of one window each."""
    measured_videos: int
    """Where fewer than the case has, seconds and forwards are scaled up: every video costs the same."""
    videos_saved: dict[int, int]
    """Of each candidate: how many videos racing spared it."""


class Clock:
    """CPU time of what runs while it watches.

    Stages are timed on the thread that enters them; decoding has a thread of its own (decord's), so it is
    timed apart, by `decode_seconds`.
    """

    def __init__(self) -> None:
        self.total_seconds = 0.0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            result = function(*arguments, **options)
            self.seconds[stage] += time.thread_time() - began
            self.calls[stage] += 1
            return result

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, stage in WATCHED:
                wrapped = self.timed(stage, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, wrapped))
            began = time.process_time()
            yield
            self.total_seconds += time.process_time() - began

    def round(self, what: str, case: Case, decode: float, measured_videos: int, scale: float = 1) -> Round:
        stages = {DECODE: decode} | {
            stage: self.seconds[stage] for stage in (EMBEDDING, BLOCKS, HEAD, NMS, MAP)
        }
        stages["rest"] = self.total_seconds - sum(stages.values())
        return Round(
            what,
            scale * self.total_seconds,
            {stage: scale * seconds for stage, seconds in stages.items()},
            round(scale * self.calls[BLOCKS] * case.windows_per_video),
            measured_videos,
            {},
        )


def naive_and_fused(case: Case) -> tuple[Round, Round, pa.Table]:
    """Both on `case.paired`, video by video in turn, and the rows of the fused one.

    Naive, as the paper's release: the undropped student and every subnet on its own, from the file to the
    detections.

    Raises:
        RuntimeError: the two do not give the same rows, bit for bit.
    """
    candidates, videos = case.student.kept_blocks, case.paired
    models = {c: without_block(case.student, c) for c in candidates} | {UNDROPPED: case.student}
    subnets = {candidate: case.detector(model) for candidate, model in models.items()}
    student, job = case.detector(case.student), case.job(candidates)
    naive, fused, rows = Clock(), Clock(), []
    for video in videos:
        with naive.watching():
            alone = [_detections(case, candidate, subnet, video) for candidate, subnet in subnets.items()]
        with fused.watching():
            rows.append(score_videos(job, student, None, [video]))
        if not pa.concat_tables(alone).equals(rows[-1]):
            raise RuntimeError(f"{case.name}: rows of {video.id} differ between the naive loop and the fused")
    # Equal rows have equal mAP: it is computed once and counted on both sides.
    table, names = pa.concat_tables(rows), tuple(video.id for video in videos)
    sweep = SweepRows("map", table, dict.fromkeys(subnets, names))
    truth = case.videos.select(names)
    began = time.process_time()
    candidate_scores(sweep, case.recipe.experiment, truth)
    evaluation = time.process_time() - began
    for clock in (naive, fused):
        clock.seconds[MAP] += evaluation
        clock.total_seconds += evaluation
    decode = decode_seconds(case, videos)
    scale = len(case.videos.videos) / len(videos)
    return (
        naive.round("naive loop", case, decode * len(subnets), len(videos), scale),
        fused.round("fused", case, decode, len(videos), scale),
        table,
    )


def decoding_once(naive: Round, arms: int) -> Round:
    """The naive loop's cost had it kept the decoded windows of a video for all its arms (computed)."""
    decode = naive.stage_seconds[DECODE] / arms
    saved = naive.stage_seconds[DECODE] - decode
    stages = naive.stage_seconds | {DECODE: decode}
    return replace(
        naive, what="naive, decode once", cpu_seconds=naive.cpu_seconds - saved, stage_seconds=stages
    )


def swept(case: Case, raced: bool) -> tuple[Round, SweepRows]:
    """A round as a run does it in one process: planned, scored slice by slice, written, read, evaluated."""
    experiment, candidates = case.recipe.experiment, case.student.kept_blocks
    if not raced:
        scoring = experiment.scoring.model_copy(update={"racing": None})
        experiment = experiment.model_copy(update={"scoring": scoring})
    recipe = case.recipe.model_copy(update={"experiment": experiment})
    nobody = replace(case.videos, videos=())
    steps = in_process_steps(recipe, Split(case.videos, nobody, nobody), case.source, lambda line: None)
    task = SweepTask("round-01-scores", ROUND, case.student, candidates, "map", "fit")
    clock = Clock()
    evaluate = clock.timed(MAP, candidate_scores)

    def watch(standing: SweepRows, final: bool) -> None:
        evaluate(standing, experiment, case.videos)

    with TemporaryDirectory() as directory:
        folder = RoundFolder(Storage.at(directory), ROUND)
        sweeper = Sweeper(recipe, steps.sweep, lambda line: None)
        with clock.watching():
            rows = sweeper.rows(folder, "scores", task, case.videos, watch)
    total, seen = len(case.videos.videos), len(rows.videos[UNDROPPED])
    decode = decode_seconds(case, case.paired) / len(case.paired) * seen
    what = "fused + racing" if raced else "fused, a whole round"
    saved = {block: total - len(rows.videos[block]) for block in candidates}
    return replace(clock.round(what, case, decode, total), videos_saved=saved), rows


def check_rows(case: Case, expected: pa.Table, sweep: SweepRows) -> None:
    """A sweep's rows of the videos in `expected` are those rows.

    Raises:
        RuntimeError: they differ.
    """
    for video in case.paired:
        ours, theirs = (table.filter(pc.equal(table["video"], video.id)) for table in (sweep.table, expected))
        if not ours.equals(theirs):
            raise RuntimeError(f"{case.name}: rows of {video.id} differ between a sweep and the naive loop")


def decode_seconds(case: Case, videos: Sequence[Video]) -> float:
    """CPU seconds of decoding the windows of `videos` once, from the file to the batch."""
    grid, window_batch = case.recipe.experiment.detector.grid, case.recipe.execution.window_batch
    began = time.process_time()
    for video in videos:
        for _ in inference_batches(case.source, video, grid, window_batch):
            pass
    return time.process_time() - began


def _detections(case: Case, candidate: int, subnet: Detector, video: Video) -> pa.Table:
    found = detect_video(subnet, video, case.source, case.recipe.execution.window_batch, CPU)
    column = pa.array(np.full(found.num_rows, candidate, dtype=np.int32))
    return found.append_column(CANDIDATE_DETECTION_SCHEMA.field("candidate"), column)
