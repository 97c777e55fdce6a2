"""Fused scoring against a forward of every subnet on its own, bit for bit."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from torch import Tensor

from pbd_ray.compression.alignment import alignment_terms
from pbd_ray.compression.blocks import UNDROPPED, Model, to_detector, without_block
from pbd_ray.compression.scoring import (
    CANDIDATE_DETECTION_SCHEMA,
    VALUE_SCHEMA,
    ScoringJob,
    detect_video,
    fused_outputs,
    score_videos,
)
from pbd_ray.config import DetectorConfig, Recipe, UserError
from pbd_ray.data.annotations import Split
from pbd_ray.data.dataset import WindowBatch, load_inference_batches, load_training_batch
from pbd_ray.data.source import VideoSource
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.losses import detection_losses
from pbd_ray.detector.postprocess import decode, detections_of_proposals

KEPT = (0, 2, 3, 4)
CPU = torch.device("cpu")
SUBSETS = [(), (0,), (4,), (2, 3), (0, 3, 4), KEPT]


@pytest.fixture
def subnet(student: Model, config: DetectorConfig) -> Callable[[int], Detector]:
    """The student less a block, on its own."""

    def make(candidate: int) -> Detector:
        model = student if candidate == UNDROPPED else without_block(student, candidate)
        return to_detector(model, config, 4)

    return make


@pytest.fixture
def make_job(make_recipe: Callable[..., Recipe], source: VideoSource) -> Callable[..., ScoringJob]:
    def make(criterion: str, *overrides: str, candidates: Sequence[int] = KEPT, **fields: Any) -> ScoringJob:
        experiment = make_recipe(f"scoring.criterion={criterion}", *overrides).experiment
        job = ScoringJob(experiment, criterion, tuple(candidates), 1, source, window_batch=2, device=CPU)
        return replace(job, **fields)

    return make


def count_block_forwards(detector: Detector) -> list[int]:
    """Filled with a block's index at each of its forwards."""
    calls: list[int] = []
    for index in detector.kept_blocks:
        block = detector.backbone.blocks[str(index)]
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    return calls


@pytest.mark.parametrize("candidates", SUBSETS, ids=str)
def test_fused_is_every_subnet_alone(
    subnet: Callable[[int], Detector], make_batch: Callable[..., WindowBatch], candidates: tuple[int, ...]
) -> None:
    batch = make_batch(3)
    with torch.inference_mode():
        fused = dict(fused_outputs(subnet(UNDROPPED), batch, candidates, with_block_outputs=True))
        assert list(fused) == [*candidates, UNDROPPED]
        for candidate, output in fused.items():
            alone = subnet(candidate)(batch.frames, batch.mask, with_block_outputs=True)
            assert torch.equal(output.logits, alone.logits)
            assert torch.equal(output.offsets, alone.offsets)
            assert torch.equal(output.mask, alone.mask)
            assert output.block_outputs.keys() == alone.block_outputs.keys()
            for block, tokens in alone.block_outputs.items():
                assert torch.equal(output.block_outputs[block], tokens)
    different = {output.logits.numpy().tobytes() for output in fused.values()}
    assert len(different) == len(fused)


def test_block_outputs_only_on_request(
    subnet: Callable[[int], Detector], make_batch: Callable[..., WindowBatch]
) -> None:
    with torch.inference_mode():
        outputs = dict(fused_outputs(subnet(UNDROPPED), make_batch(1), KEPT))
    assert all(output.block_outputs == {} for output in outputs.values())


@pytest.mark.parametrize("candidates", SUBSETS, ids=str)
def test_block_forwards(
    subnet: Callable[[int], Detector], make_batch: Callable[..., WindowBatch], candidates: tuple[int, ...]
) -> None:
    """n for the main stream, and for a candidate the blocks after it: n(n-1)/2 + n for all."""
    student = subnet(UNDROPPED)
    calls = count_block_forwards(student)
    with torch.inference_mode():
        for _ in fused_outputs(student, make_batch(1), candidates):
            pass
    after = sum(sum(block > candidate for block in KEPT) for candidate in candidates)
    assert len(calls) == len(KEPT) + after
    if candidates == KEPT:
        n = len(KEPT)
        assert len(calls) == n * (n - 1) // 2 + n


@pytest.mark.parametrize("together", [2, 3, len(KEPT)])
@pytest.mark.parametrize("candidates", SUBSETS, ids=str)
def test_candidates_together(
    subnet: Callable[[int], Detector],
    make_batch: Callable[..., WindowBatch],
    candidates: tuple[int, ...],
    together: int,
) -> None:
    """The outputs of one by one, in fewer and larger block forwards."""
    student, batch = subnet(UNDROPPED), make_batch(3)
    calls = count_block_forwards(student)
    with torch.inference_mode():
        alone = dict(fused_outputs(student, batch, candidates, with_block_outputs=True))
        alone_calls = len(calls)
        calls.clear()
        stacked = dict(fused_outputs(student, batch, candidates, with_block_outputs=True, together=together))
    assert list(stacked) == list(alone)
    for candidate, output in stacked.items():
        expected = alone[candidate]
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.offsets, expected.offsets)
        assert torch.equal(output.mask, expected.mask)
        assert output.block_outputs.keys() == expected.block_outputs.keys()
        for block, tokens in expected.block_outputs.items():
            torch.testing.assert_close(output.block_outputs[block], tokens)
    groups = [candidates[start : start + together] for start in range(0, len(candidates), together)]
    assert len(calls) == len(KEPT) + sum(sum(block > group[0] for block in KEPT) for group in groups)
    assert len(calls) < alone_calls or all(sum(block in KEPT[:-1] for block in group) < 2 for group in groups)


@pytest.mark.parametrize("together", [1, 2, 3, len(KEPT)])
def test_token_tensors_at_a_time(
    subnet: Callable[[int], Detector],
    make_batch: Callable[..., WindowBatch],
    monkeypatch: pytest.MonkeyPatch,
    together: int,
) -> None:
    """The main stream's and those of the forks of one batch, whatever the number of candidates."""
    student, held, block_rows = subnet(UNDROPPED), [], 0
    original = type(student.backbone).run_block

    def watched(self: Any, index: int, tokens: Tensor) -> Tensor:
        nonlocal block_rows
        block_rows += len(tokens)
        held.append(bytes_alike(tokens))
        return original(self, index, tokens)

    monkeypatch.setattr(type(student.backbone), "run_block", watched)
    batch = make_batch(1)
    with torch.inference_mode():
        tokens = student.backbone.embed(batch.frames)
        rows, token_bytes, others = len(tokens), tokens.nbytes, bytes_alike(tokens) - tokens.nbytes
        del tokens
        for _ in fused_outputs(student, batch, KEPT, together=together):
            pass
    most = min(together, len(KEPT) - 1) + 1  # the last candidate runs no block
    assert max(held) - others == most * token_bytes
    assert block_rows == 10 * rows


def bytes_alike(tokens: Tensor) -> int:
    """Memory of all tensors of these tokens' shape but for the first dimension, their views included."""
    alike = [t for t in gc.get_objects() if type(t) is Tensor and t.shape[1:] == tokens.shape[1:]]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alike}.values())


def naive_detections(detector: Detector, job: ScoringJob, videos: Sequence[Any]) -> list[pa.Table]:
    config, tables = detector.config, []
    for video in videos:
        pooled = []
        for batch in load_inference_batches(video, job.source.data_root, config.grid, job.window_batch):
            with torch.inference_mode():
                output = detector(batch.frames, batch.mask)
            pooled += decode(output, batch.windows, config.postprocess)
        tables.append(detections_of_proposals(pooled, config.grid, config.postprocess))
    return tables


def test_map_rows(
    make_job: Callable[..., ScoringJob], subnet: Callable[[int], Detector], split: Split
) -> None:
    """Detections of every subnet, as if it had been run alone, without the cache."""
    job, videos = make_job("map"), split.fit.videos
    table = score_videos(job, subnet(UNDROPPED), None, videos)
    assert table.schema == CANDIDATE_DETECTION_SCHEMA
    candidates = table["candidate"].to_numpy()
    assert set(candidates) == {UNDROPPED, *KEPT}
    for candidate in (UNDROPPED, *KEPT):
        rows = table.filter(pa.array(candidates == candidate)).drop_columns("candidate")
        expected = pa.concat_tables(naive_detections(subnet(candidate), job, videos))
        assert rows.num_rows > 100
        assert rows.equals(expected)


def test_evaluation_is_map_scoring_without_candidates(
    make_job: Callable[..., ScoringJob], subnet: Callable[[int], Detector], split: Split
) -> None:
    job, video = make_job("map", candidates=()), split.test.videos[0]
    table = score_videos(job, subnet(UNDROPPED), None, [video])
    assert set(table["candidate"].to_pylist()) == {UNDROPPED}
    detected = detect_video(subnet(UNDROPPED), video, job.source, job.window_batch, CPU)
    assert table.drop_columns("candidate").equals(detected)


def test_nothing_detected(
    make_job: Callable[..., ScoringJob], subnet: Callable[[int], Detector], split: Split
) -> None:
    """No rows, and the schema."""
    silent = subnet(UNDROPPED)
    with torch.no_grad():
        silent.head.class_output.weight.zero_()
        silent.head.class_output.bias.fill_(-50)
    table = score_videos(make_job("map"), silent, None, split.fit.videos[:1])
    assert table.num_rows == 0 and table.schema == CANDIDATE_DETECTION_SCHEMA
    for criterion, schema in (("map", CANDIDATE_DETECTION_SCHEMA), ("mse", VALUE_SCHEMA)):
        assert score_videos(make_job(criterion), silent, None, []).schema == schema


def by_video(table: pa.Table) -> dict[str, pa.Table]:
    names = dict.fromkeys(table["video"].to_pylist())
    return {name: table.filter(pc.equal(table["video"], name)).combine_chunks() for name in names}


@pytest.mark.parametrize("criterion", ["map", "train_loss", "mse"])
def test_rows_of_a_video_depend_on_nothing_else(
    make_job: Callable[..., ScoringJob], subnet: Callable[[int], Detector], split: Split, criterion: str
) -> None:
    """Neither on slices, nor on the order of videos, nor on which candidates are alive."""
    job, videos, student = make_job(criterion), list(split.fit.videos), subnet(UNDROPPED)
    whole = by_video(score_videos(job, student, None, videos))
    assert set(whole) == {video.id for video in videos}
    for order in ([[3], [2], [1], [0]], [[1, 0], [3, 2]], [[2, 0, 3], [1]]):
        for piece in order:
            part = by_video(score_videos(job, student, None, [videos[index] for index in piece]))
            assert all(part[name].equals(whole[name]) for name in part)
    few = make_job(criterion, candidates=(2,))
    wanted = pa.array([2] if criterion == "mse" else [2, UNDROPPED], pa.int32())
    for name, rows in by_video(score_videos(few, student, None, videos)).items():
        expected = whole[name].filter(pc.is_in(whole[name]["candidate"], wanted))
        assert rows.equals(expected.combine_chunks())


@pytest.mark.parametrize("terms", ["supervised", "total"])
def test_train_loss(
    make_job: Callable[..., ScoringJob],
    subnet: Callable[[int], Detector],
    split: Split,
    teacher: Model,
    config: DetectorConfig,
    terms: str,
) -> None:
    """A loop over videos and subnets; the augmented window is drawn by (seed, round, video)."""
    job = make_job(
        "train_loss", "seed=5", f"scoring.loss_terms={terms}", "detector.grid.augmentation=full", round=3
    )
    grid = job.experiment.detector.grid
    student, guide = subnet(UNDROPPED), to_detector(teacher, config, 4)
    student.config = job.experiment.detector
    student.head.loss_normalizer.fill_(3.0)
    table = score_videos(job, student, guide, split.fit.videos)
    assert table.schema == VALUE_SCHEMA and table.num_rows == len(split.fit.videos) * 5
    found = {(row["video"], row["candidate"]): row["value"] for row in table.to_pylist()}
    for video in split.fit.videos:
        batch = load_training_batch([video], job.source.data_root, grid, (5, 3))
        for candidate in (UNDROPPED, *KEPT):
            with torch.inference_mode():
                ours = subnet(candidate)(batch.frames, batch.mask, with_block_outputs=True)
                theirs = guide(batch.frames, batch.mask, with_block_outputs=True)
            losses = detection_losses(ours, batch.segments, batch.labels, config.head, torch.tensor(3.0))
            expected = float(losses.focal) + float(losses.boundary)
            if terms == "total":
                positive = assigned(ours, batch, config)
                aligned = alignment_terms(
                    ours,
                    theirs,
                    positive,
                    job.experiment.alignment,
                    float(ours.mask.sum()),
                    float(positive.sum()),
                )
                expected += float(aligned.feature) + float(aligned.class_kl) + float(aligned.boundary)
            assert found[video.id, candidate] == pytest.approx(expected, rel=1e-6)


def assigned(output: Any, batch: WindowBatch, config: DetectorConfig) -> Tensor:
    """Positive points of one window, one by one: inside, near the centre, of the level's range."""
    positive = torch.zeros_like(output.mask)
    for point, (t, low, high, stride) in enumerate(output.points.tolist()):
        for start, end in batch.segments[0].tolist():
            centre, farthest = (start + end) / 2, max(t - start, end - t)
            near = abs(t - centre) < config.head.center_radius * stride and start < t < end
            if near and low <= farthest <= high and output.mask[0, point]:
                positive[0, point] = True
    assert positive.any()
    return positive


def test_all_candidates_see_the_same_window(
    make_job: Callable[..., ScoringJob],
    subnet: Callable[[int], Detector],
    split: Split,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One draw and one embedding a video; another round or seed draws another."""
    seen: list[bytes] = []
    student = subnet(UNDROPPED)
    original = type(student.backbone).embed

    def recording(self: Any, frames: Tensor) -> Tensor:
        seen.append(frames.numpy().tobytes())
        return original(self, frames)

    monkeypatch.setattr(type(student.backbone), "embed", recording)
    video = split.fit.videos[0]
    draws = [
        score_videos(job, student, None, [video])["value"].to_pylist()
        for job in (
            make_job("train_loss"),
            make_job("train_loss"),
            make_job("train_loss", round=2),
            make_job("train_loss", "seed=9"),
        )
    ]
    assert len(seen) == 4
    assert seen[0] == seen[1] and draws[0] == draws[1]
    assert len(set(seen)) == 3


def test_mse(make_job: Callable[..., ScoringJob], subnet: Callable[[int], Detector], split: Split) -> None:
    """Window by window, block by block; n block forwards a batch."""
    job, student = make_job("mse", candidates=(2, 4)), subnet(UNDROPPED)
    calls = count_block_forwards(student)
    table = score_videos(job, student, None, split.fit.videos)
    assert table.schema == VALUE_SCHEMA
    found = {(row["video"], row["candidate"]): row["value"] for row in table.to_pylist()}
    assert set(found) == {(video.id, block) for video in split.fit.videos for block in (2, 4)}
    alone, batches = subnet(UNDROPPED).backbone, 0
    for video in split.fit.videos:
        windows = list(load_inference_batches(video, job.source.data_root, student.config.grid, 1))
        batches += -(-len(windows) // job.window_batch)
        changes: dict[int, list[float]] = {block: [] for block in KEPT}
        for window in windows:
            with torch.inference_mode():
                tokens = alone.embed(window.frames)
                for block in KEPT:
                    after = alone.blocks[str(block)](tokens)
                    difference = after.double().numpy() - tokens.double().numpy()
                    changes[block].append(float(np.mean(difference**2)))
                    tokens = after
        for block in (2, 4):
            assert found[video.id, block] == pytest.approx(np.mean(changes[block]), rel=1e-5)
    assert len(calls) == batches * len(KEPT)


@pytest.mark.parametrize("criterion", ["map", "train_loss", "mse"])
def test_decoding_ahead_changes_nothing(
    make_job: Callable[..., ScoringJob], subnet: Callable[[int], Detector], split: Split, criterion: str
) -> None:
    """Not a bit: with any number of threads, with a cache to fill, with draws to make."""
    job, student = make_job(criterion, "detector.grid.augmentation=full"), subnet(UNDROPPED)
    student.config = job.experiment.detector
    expected = score_videos(job, student, None, split.fit.videos)
    assert expected.num_rows
    for threads in (1, 3):
        ahead = replace(job, decoding_threads=threads, source=VideoSource(job.source.data_root))
        assert score_videos(ahead, student, None, split.fit.videos).equals(expected)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_video_that_cannot_be_read(
    make_job: Callable[..., ScoringJob], subnet: Callable[[int], Detector], split: Split, threads: int
) -> None:
    """Its error reaches the caller, and no thread stays."""
    job, running = make_job("mse", decoding_threads=threads), threading.enumerate()
    videos = [
        *split.fit.videos[:2],
        replace(split.fit.videos[2], id="nowhere", path="nowhere.mp4"),
        split.fit.videos[3],
    ]
    with pytest.raises(UserError, match="nowhere"):
        score_videos(job, subnet(UNDROPPED), None, videos)
    assert threading.enumerate() == running


@pytest.mark.parametrize("criterion", ["map", "train_loss", "mse"])
def test_scoring_in_half_precision(
    make_job: Callable[..., ScoringJob], subnet: Callable[[int], Detector], split: Split, criterion: str
) -> None:
    """Close to full precision, and not the same."""
    videos = split.fit.videos[:1]
    exact, half = (
        score_videos(make_job(criterion, f"autocast={kind}"), subnet(UNDROPPED), None, videos)
        for kind in ("none", "bfloat16")
    )
    assert not exact.equals(half)
    if criterion != "map":
        assert half["value"].to_pylist() == pytest.approx(exact["value"].to_pylist(), rel=0.1)
