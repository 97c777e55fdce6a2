from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pbd_ray.config import GridConfig
from pbd_ray.data import dataset
from pbd_ray.data.annotations import Annotations, Video, load_annotations
from pbd_ray.data.dataset import WindowBatch, load_inference_batches, load_training_batch
from pbd_ray.data.json_file import AnnotationError
from pbd_ray.data.video import FrameReader, VideoError, read_frames
from pbd_ray.data.windows import inference_windows

GRID = GridConfig(
    window_frames=32,
    stride_frames=5,
    feature_steps=16,
    train_short_side_pixels=36,
    test_short_side_pixels=33,
    crop_pixels=32,
)


@pytest.fixture(scope="module")
def arid(shared: Path) -> Annotations:
    return load_annotations(shared / "data" / "arid_composed" / "annotations.json")


@pytest.fixture(scope="module")
def root(shared: Path) -> str:
    return str(shared / "data" / "arid_composed" / "videos")


def joined(batches: list[WindowBatch]) -> torch.Tensor:
    return torch.cat([batch.frames for batch in batches])


@pytest.mark.parametrize("window_batch", [1, 2, 3, 100])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_inference_pixels_are_the_file_s(
    arid: Annotations, root: str, window_batch: int, overlap: float
) -> None:
    """Against each window read on its own, cropped by slices."""
    video = arid.videos[0]
    grid = GRID.model_copy(update={"overlap": overlap})
    windows = inference_windows(video, grid)
    batches = list(load_inference_batches(video, root, grid, window_batch))
    assert [len(batch.windows) for batch in batches[:-1]] == [window_batch] * (len(batches) - 1)
    assert [w.start_frame for batch in batches for w in batch.windows] == [w.start_frame for w in windows]
    frames = joined(batches)
    assert frames.shape == (len(windows), 3, 32, 32, 32) and frames.dtype == torch.uint8
    for window, clip in zip(windows, frames, strict=True):
        raw = read_frames(f"{root}/{video.path}", window.frame_indices, 33)  # 33 x 44
        top, left = round((33 - 32) / 2), (44 - 32) // 2
        expected = raw[:, top : top + 32, left : left + 32].transpose(3, 0, 1, 2)
        assert np.array_equal(clip.numpy(), expected)


def test_a_frame_is_decoded_once(arid: Annotations, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = FrameReader.read

    def recording(self: FrameReader, indices: Any) -> Any:
        read.extend(indices.tolist())
        return original(self, indices)

    monkeypatch.setattr(FrameReader, "read", recording)
    video = arid.videos[0]
    batches = list(load_inference_batches(video, root, GRID, 1))
    assert len(batches) > 3
    assert read == sorted(set(read)) == list(range(0, video.frames, 5))


def test_batches_are_made_one_at_a_time(
    arid: Annotations, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = FrameReader.read

    def counting(self: FrameReader, indices: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, indices)

    monkeypatch.setattr(FrameReader, "read", counting)
    stream = load_inference_batches(arid.videos[0], root, GRID, 1)
    next(stream)
    assert calls == 1


def test_mask_says_what_is_video(arid: Annotations, root: str) -> None:
    grid = GRID.model_copy(update={"window_frames": 256, "feature_steps": 64})
    video = arid.videos[0]  # 670 frames: 134 steps of 256, so 33.5 of 64
    (batch,) = load_inference_batches(video, root, grid, 4)
    assert batch.mask.dtype == torch.bool and batch.mask.shape == (1, 64)
    assert batch.mask[0].tolist() == [True] * 34 + [False] * 30
    assert [len(part) for part in (*batch.segments, *batch.labels)] == [0, 0]
    assert torch.equal(batch.frames[0, :, 133], batch.frames[0, :, 255])


def test_training_batch(arid: Annotations, root: str) -> None:
    videos = arid.videos[:3]
    batch = load_training_batch(videos, root, GRID, (0, 1))
    assert batch.frames.shape == (3, 3, 32, 32, 32) and batch.frames.dtype == torch.uint8
    assert batch.mask.shape == (3, 16)
    for video, window, segments, labels in zip(
        videos, batch.windows, batch.segments, batch.labels, strict=True
    ):
        assert window.video == video.id
        assert segments.dtype == torch.float32 and labels.dtype == torch.int64
        assert segments.shape == (len(labels), 2)
        assert set(labels.tolist()) <= set(video.labels.tolist())
        assert window.frame_indices.max() < video.frames
    assert sum(len(labels) for labels in batch.labels) > 0


def test_draws_depend_on_key_and_video_alone(arid: Annotations, root: str) -> None:
    a, b, c = arid.videos[:3]
    together = load_training_batch([a, b, c], root, GRID, (3, 1, 4))
    alone = load_training_batch([b], root, GRID, (3, 1, 4))
    assert torch.equal(together.frames[1], alone.frames[0])
    assert torch.equal(together.segments[1], alone.segments[0])
    starts, clips = set(), set()
    for key in [(3, 1, 4), (3, 1, 5), (4, 1, 4), (3, 1), (3, 1, 4, 0), ()]:
        batch = load_training_batch([b], root, GRID, key)
        starts.add(batch.windows[0].start_frame)
        clips.add(batch.frames.numpy().tobytes())
    assert len(clips) == 6 and len(starts) > 2
    renamed = replace(b, id="training_0001_copy")
    other = load_training_batch([renamed], root, GRID, (3, 1, 4))
    assert not torch.equal(other.frames, alone.frames)


def test_training_leaves_the_global_generators_alone(arid: Annotations, root: str) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    load_training_batch(arid.videos[:1], root, GRID, (0,))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]


def test_augmentations_share_the_window(arid: Annotations, root: str) -> None:
    batches = [
        load_training_batch(arid.videos[:1], root, GRID.model_copy(update={"augmentation": kind}), (5,))
        for kind in ("full", "flip", "none")
    ]
    assert len({batch.windows[0].start_frame for batch in batches}) == 1
    assert not torch.equal(batches[0].frames, batches[2].frames)


def test_unknown_frame_counts_come_from_the_file(arid: Annotations, root: str) -> None:
    known = arid.videos[0]
    unknown = replace(known, frames=0, fps=0.0)
    for grid in (GRID, GRID.model_copy(update={"kind": "resize"})):
        assert torch.equal(
            joined(list(load_inference_batches(unknown, root, grid, 2))),
            joined(list(load_inference_batches(known, root, grid, 2))),
        )
        assert torch.equal(
            load_training_batch([unknown], root, grid, (1,)).frames,
            load_training_batch([known], root, grid, (1,)).frames,
        )


def test_a_real_untrimmed_video_whole(shared: Path) -> None:
    """ActivityNet's grid; its file is named v_ + id."""
    folder = shared / "data" / "activitynet"
    (video,) = (
        load_annotations(folder / "annotations.json", class_agnostic=True).select(["GGSY1Qvo990"]).videos
    )
    grid = GRID.model_copy(update={"kind": "resize", "window_frames": 64, "feature_steps": 16})
    (batch,) = load_inference_batches(video, str(folder / "videos"), grid, 4)
    assert batch.frames.shape == (1, 3, 64, 32, 32) and batch.mask.all()
    training = load_training_batch([video], str(folder / "videos"), grid, (0,), min_instance_fraction=0.01)
    assert training.segments[0].tolist() == [pytest.approx([5.824 / 18.16 * 16, 16.199 / 18.16 * 16])]
    none = load_training_batch([video], str(folder / "videos"), grid, (0,), min_instance_fraction=0.9)
    assert none.segments[0].shape == (0, 2) and none.labels[0].shape == (0,)


def test_errors_are_one_line(arid: Annotations, root: str, tmp_path: Path) -> None:
    def both(video: Video, folder: str) -> list[str]:
        messages = []
        for use in (
            lambda: list(load_inference_batches(video, folder, GRID, 2)),
            lambda: load_training_batch([video], folder, GRID, (0,)),
        ):
            with pytest.raises((AnnotationError, VideoError)) as caught:
                use()
            messages.append(str(caught.value))
        return messages

    video = arid.videos[0]
    (tmp_path / video.path).touch()
    cases = [
        (both(video, str(tmp_path / "elsewhere")), "no file for video 'training_0000'"),
        (both(video, str(tmp_path)), "training_0000.mp4: the video file is empty (0 bytes)"),
        (both(replace(video, frames=1340), root), "the file has 670 frames, its annotation says 1340"),
        (both(replace(video, frames=335), root), "the file has 670 frames, its annotation says 335"),
    ]
    for messages, expected in cases:
        for message in messages:
            assert expected in message and "\n" not in message


def test_frames_at_the_end_that_the_annotation_has_too_many(arid: Annotations, root: str) -> None:
    video = replace(arid.videos[0], frames=672)
    grid = GRID.model_copy(update={"stride_frames": 1})
    last = list(load_inference_batches(video, root, grid, 4))[-1]
    assert last.windows[-1].frame_indices[-1] == 671
    assert torch.equal(last.frames[-1, :, -1], last.frames[-1, :, -3])


def test_short_side_covers_the_crop(arid: Annotations, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Recording(FrameReader):
        def __init__(self, path: str, short_side: int) -> None:
            asked.append(short_side)
            super().__init__(path, short_side)

    monkeypatch.setattr(dataset, "FrameReader", Recording)
    grid = GRID.model_copy(update={"test_short_side_pixels": 20, "train_short_side_pixels": 48})
    next(load_inference_batches(arid.videos[0], root, grid, 1))
    load_training_batch(arid.videos[:1], root, grid, (0,))
    assert asked == [32, 48]
