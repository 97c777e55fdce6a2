"""The frame cache: what it gives is what the file holds, whoever else writes beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pbd_ray.config import GridConfig, SyntheticConfig
from pbd_ray.data import cache as cache_module
from pbd_ray.data import dataset, synthetic
from pbd_ray.data.annotations import Annotations
from pbd_ray.data.cache import CachedFrames, FrameCache
from pbd_ray.data.dataset import load_inference_batches, load_training_batch
from pbd_ray.data.video import FrameReader, VideoError, read_frames
from pbd_ray.data.windows import grid_frames

CONFIG = SyntheticConfig(
    fit_videos=2, selection_videos=1, test_videos=1, short_side_pixels=32,
    min_duration_seconds=5.0, max_duration_seconds=6.0,
)  # fmt: skip
GRID = GridConfig(
    window_frames=32, stride_frames=2, feature_steps=32, overlap=0.5,
    train_short_side_pixels=20, test_short_side_pixels=20, crop_pixels=16, augmentation="flip",
)  # fmt: skip
SIDE = 20
BIG = 10**9


@pytest.fixture(scope="module")
def root(video_cache: Path) -> Path:
    return synthetic.ensure(CONFIG, video_cache)


@pytest.fixture(scope="module")
def annotations() -> Annotations:
    return synthetic.annotate(CONFIG)


@pytest.fixture
def video(root: Path, annotations: Annotations) -> tuple[str, int]:
    """Path and frame count of one file."""
    first = annotations.videos[0]
    return str(root / first.path), first.frames


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frame numbers in the order in which files were asked for them."""
    read: list[int] = []
    original = FrameReader.read

    def recording(self: FrameReader, indices: Any) -> Any:
        read.extend(indices.tolist())
        return original(self, indices)

    monkeypatch.setattr(FrameReader, "read", recording)
    return read


def every(step: int, frames: int) -> np.ndarray:
    return np.arange(0, frames, step, dtype=np.int64)


def opened(cache: FrameCache, path: str, wanted: np.ndarray, frames: int) -> CachedFrames:
    cached = cache.open(path, SIDE, wanted, frames)
    assert isinstance(cached, CachedFrames)
    return cached


@pytest.mark.parametrize("step", [1, 3, 7])
def test_frames_are_the_file_s(tmp_path: Path, video: tuple[str, int], step: int) -> None:
    """In any order and with repeats; a writable copy, the cache stays what it is."""
    path, frames = video
    wanted = every(step, frames)
    cached = opened(FrameCache(tmp_path / "frames", BIG), path, wanted, frames)
    assert np.array_equal(cached.read(wanted), read_frames(path, wanted, SIDE))
    some = wanted[[5, 0, len(wanted) - 1, 5, 5, 2]]
    found = cached.read(some)
    assert np.array_equal(found, read_frames(path, some, SIDE))
    assert found.dtype == np.uint8 and type(found) is np.ndarray and found.flags.writeable
    found[:] = 0
    assert np.array_equal(cached.read(some), read_frames(path, some, SIDE))


def test_a_frame_count_that_is_a_little_too_high(tmp_path: Path, video: tuple[str, int]) -> None:
    """Beyond the end is the last frame, as without the cache."""
    path, frames = video
    wanted = every(1, frames + 3)
    cached = opened(FrameCache(tmp_path, BIG), path, wanted, frames + 3)
    assert np.array_equal(cached.read(wanted[-4:]), read_frames(path, wanted[-4:], SIDE))


def test_decoded_once(tmp_path: Path, video: tuple[str, int], decoded: list[int]) -> None:
    path, frames = video
    cache, wanted = FrameCache(tmp_path, BIG), every(2, frames)
    for _ in range(3):
        opened(cache, path, wanted, frames).read(wanted)
    assert decoded == [0, *wanted.tolist()]  # frame 0 once more: it tells the size
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_filled_in_chunks(
    tmp_path: Path, video: tuple[str, int], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(cache_module, "_CHUNK_FRAMES", chunk)
    path, frames = video
    wanted = every(2, frames)
    cached = opened(FrameCache(tmp_path, BIG), path, wanted, frames)
    assert np.array_equal(cached.read(wanted), read_frames(path, wanted, SIDE))


@pytest.mark.parametrize("outside", [1, 10**6, -1])
def test_other_frames_are_a_mistake(tmp_path: Path, video: tuple[str, int], outside: int) -> None:
    """Between the wanted ones, beyond and before them."""
    path, frames = video
    cached = opened(FrameCache(tmp_path, BIG), path, every(2, frames), frames)
    with pytest.raises(AssertionError, match="not among the wanted"):
        cached.read(np.array([0, outside]))


def touched(path: str) -> dict[str, Any]:
    changed = Path(path).stat().st_mtime_ns + 1
    os.utime(path, ns=(changed, changed))
    return {}


CHANGES: dict[str, Callable[[str], dict[str, Any]]] = {
    "nothing": lambda path: {},
    "time of change": touched,
    "size on screen": lambda path: {"short_side": 18},
    "frames": lambda path: {"step": 3},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_another_entry(
    tmp_path: Path, video: tuple[str, int], decoded: list[int], change: str
) -> None:
    path, frames = video
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(Path(path).read_bytes())
    cache = FrameCache(tmp_path / "frames", BIG)
    opened(cache, str(copy), every(2, frames), frames)
    decoded.clear()
    settings = {"short_side": SIDE, "step": 2} | CHANGES[change](str(copy))
    cache.open(str(copy), settings["short_side"], every(settings["step"], frames), frames)
    again = change != "nothing"
    assert bool(decoded) == again
    assert len(list(cache.directory.iterdir())) == 1 + again


def test_a_changed_file_is_never_served_from_the_old_one(
    tmp_path: Path, root: Path, annotations: Annotations
) -> None:
    """Another video under the same name."""
    first, second = annotations.videos[:2]
    copy, cache = tmp_path / "copy.mp4", FrameCache(tmp_path / "frames", BIG)
    for source in (first, second):
        copy.write_bytes((root / source.path).read_bytes())
        wanted = every(4, source.frames)
        cached = opened(cache, str(copy), wanted, source.frames)
        assert np.array_equal(cached.read(wanted), read_frames(str(root / source.path), wanted, SIDE))


def test_budget(tmp_path: Path, root: Path, annotations: Annotations) -> None:
    """The first that fit stay; what does not fit is read from its file, and leaves nothing."""
    sizes = [len(every(2, video.frames)) * SIDE * SIDE * 3 for video in annotations.videos]
    budget = sizes[0] + sizes[1] + 1000
    cache = FrameCache(tmp_path, budget)

    def fits(index: int) -> bool:
        video = annotations.videos[index]
        found = cache.open(str(root / video.path), SIDE, every(2, video.frames), video.frames)
        return isinstance(found, CachedFrames)

    assert [fits(index) for index in range(4)] == [True, True, False, False]
    assert [fits(index) for index in range(4)] == [True, True, False, False]
    files = list(tmp_path.iterdir())
    assert len(files) == 2 and sum(file.stat().st_size for file in files) <= budget
    path, wanted = str(root / annotations.videos[3].path), every(2, annotations.videos[3].frames)
    read = cache.open(path, SIDE, wanted, annotations.videos[3].frames).read(wanted)
    assert np.array_equal(read, read_frames(path, wanted, SIDE))


@pytest.mark.parametrize(
    ("free", "kept", "shortfall"), [(0, False, 2.5e9), (4e9, True, 0), (1.5e9, True, 1e9)]
)
def test_a_disk_that_is_smaller_than_the_budget(
    tmp_path: Path, video: tuple[str, int], monkeypatch: pytest.MonkeyPatch,
    free: float, kept: bool, shortfall: float,
) -> None:  # fmt: skip
    """Half a gigabyte of it is left to others."""
    monkeypatch.setattr(cache_module, "free_bytes", lambda path: int(free))
    cache, (path, frames) = FrameCache(tmp_path, 2 * BIG), video
    assert cache.shortfall_bytes() == shortfall
    found = cache.open(path, SIDE, every(4, frames), frames)
    assert isinstance(found, CachedFrames) is kept
    assert len(list(tmp_path.iterdir())) == kept


def test_a_file_that_vanishes_while_the_budget_is_counted(
    tmp_path: Path, video: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has renamed its .part file since the directory was listed."""

    class Vanished:
        name = "0.1-1.part"

        def stat(self) -> os.stat_result:
            raise FileNotFoundError

    original = os.scandir

    def listing(directory: Any) -> Iterator[Any]:
        yield Vanished()
        yield from original(directory)

    monkeypatch.setattr(cache_module.os, "scandir", listing)
    path, frames = video
    assert isinstance(FrameCache(tmp_path, BIG).open(path, SIDE, every(2, frames), frames), CachedFrames)


def test_what_a_killed_process_left(tmp_path: Path, video: tuple[str, int]) -> None:
    """A half-written file takes the whole budget: for good, if nobody has written to it for long."""
    path, frames = video
    left = tmp_path / "0.1-1.part"
    left.write_bytes(bytes(1000))
    cache = FrameCache(tmp_path, len(every(2, frames)) * SIDE * SIDE * 3 + 500)
    assert not isinstance(cache.open(path, SIDE, every(2, frames), frames), CachedFrames)
    os.utime(left, (0, 0))
    assert isinstance(cache.open(path, SIDE, every(2, frames), frames), CachedFrames)
    assert not left.exists()


def test_a_broken_file(tmp_path: Path) -> None:
    """The reader's own error, and nothing on disk."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    cache = FrameCache(tmp_path / "frames", BIG)
    with pytest.raises(VideoError) as theirs:
        FrameReader(str(broken), SIDE)
    with pytest.raises(VideoError) as ours:
        cache.open(str(broken), SIDE, every(2, 100), 100)
    assert str(ours.value) == str(theirs.value)
    assert not cache.directory.exists()


def test_a_file_that_is_not_the_annotated_one(tmp_path: Path, video: tuple[str, int]) -> None:
    path, frames = video
    with pytest.raises(VideoError, match=f"has {frames} frames, its annotation says 500"):
        FrameCache(tmp_path, BIG).open(path, SIDE, every(2, 500), 500)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_breaks_off(
    tmp_path: Path, video: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that shows only after half of the frames: no .part file stays, and a whole file fills later."""
    monkeypatch.setattr(cache_module, "_CHUNK_FRAMES", 16)
    original, calls = FrameReader.read, []

    def breaking(self: FrameReader, indices: Any) -> Any:
        calls.append(len(indices))
        if len(calls) == 4:
            raise VideoError("frame 32 is damaged")
        return original(self, indices)

    path, frames = video
    cache = FrameCache(tmp_path, BIG)
    with monkeypatch.context() as patch:
        patch.setattr(FrameReader, "read", breaking)
        with pytest.raises(VideoError, match="frame 32 is damaged"):
            cache.open(path, SIDE, every(2, frames), frames)
    assert calls == [1, 16, 16, 16] and list(tmp_path.iterdir()) == []
    wanted = every(2, frames)
    assert np.array_equal(opened(cache, path, wanted, frames).read(wanted), read_frames(path, wanted, SIDE))


def test_threads_fill_the_same_file(
    tmp_path: Path, video: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one process, side by side through every read."""
    original, together = FrameReader.read, threading.Barrier(2, timeout=60)

    def in_step(self: FrameReader, indices: Any) -> Any:
        together.wait()
        return original(self, indices)

    path, frames = video
    wanted, cache = every(2, frames), FrameCache(tmp_path, BIG)
    expected = read_frames(path, wanted, SIDE)
    monkeypatch.setattr(FrameReader, "read", in_step)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: opened(cache, path, wanted, frames).read(wanted), range(2)))
    assert all(np.array_equal(pixels, expected) for pixels in found)
    assert [file.suffix for file in tmp_path.iterdir()] == [".npy"]


FILL = """
import sys, time
from pathlib import Path
import numpy as np
from pbd_ray.data.cache import FrameCache
directory, mine, other, *files = sys.argv[1:]
Path(mine).touch()
while not Path(other).exists():
    time.sleep(0.001)
cache = FrameCache(Path(directory), 10**9)
for file in files:
    path, frames = file.rsplit("|", 1)
    wanted = np.arange(0, int(frames), 2, dtype=np.int64)
    found = cache.open(path, 20, wanted, int(frames)).read(wanted)
    print(int(found.astype(np.int64).sum()))
"""


def test_processes_fill_the_same_cache(tmp_path: Path, root: Path, annotations: Annotations) -> None:
    """Two that start at once and want the same files: both get the right frames, one file of each is left."""
    files = [f"{root / video.path}|{video.frames}" for video in annotations.videos]
    directory, first, second = (str(tmp_path / name) for name in ("frames", "first", "second"))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, directory, *names, *files], stdout=subprocess.PIPE, text=True
        )
        for names in ((first, second), (second, first))
    ]
    try:
        printed = [process.communicate(timeout=300)[0].split() for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [process.returncode for process in running] == [0, 0]
    expected = []
    for video in annotations.videos:
        pixels = read_frames(str(root / video.path), every(2, video.frames), SIDE)
        expected.append(str(int(pixels.astype(np.int64).sum())))
    assert printed == [expected, expected]
    left = list(Path(directory).iterdir())
    assert len(left) == len(files) and {file.suffix for file in left} == {".npy"}


@pytest.mark.parametrize("kind", ["sliding", "resize"])
@pytest.mark.parametrize("budget", [BIG, 1])
def test_batches_do_not_depend_on_the_cache(
    tmp_path: Path, root: Path, annotations: Annotations, kind: str, budget: int
) -> None:
    """Neither pixels nor windows, at training or inference, whether it holds the video or has no room."""
    grid, cache = GRID.model_copy(update={"kind": kind}), FrameCache(tmp_path, budget)
    for video in annotations.videos[:2]:
        with_cache, without = (
            list(load_inference_batches(video, str(root), grid, 2, use)) for use in (cache, None)
        )
        for ours, theirs in zip(with_cache, without, strict=True):
            assert torch.equal(ours.frames, theirs.frames) and torch.equal(ours.mask, theirs.mask)
        for seed in range(4):
            ours, theirs = (
                load_training_batch([video], str(root), grid, (seed,), cache=use) for use in (cache, None)
            )
            assert torch.equal(ours.frames, theirs.frames)
            assert torch.equal(ours.segments[0], theirs.segments[0])
    assert len(list(tmp_path.iterdir())) == (2 if budget == BIG else 0)


def test_a_cached_epoch_touches_no_file(
    tmp_path: Path, root: Path, annotations: Annotations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry serves training and inference where both read frames of one size."""
    cache, video = FrameCache(tmp_path, BIG), annotations.videos[0]
    load_training_batch([video], str(root), GRID, (0,), cache=cache)

    def refuse(*_: Any) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(dataset, "FrameReader", refuse)
    monkeypatch.setattr(cache_module, "FrameReader", refuse)
    for seed in range(5):
        load_training_batch([video], str(root), GRID, (seed,), cache=cache)
    assert list(load_inference_batches(video, str(root), GRID, 2, cache))
    assert len(grid_frames(video, GRID)) == len(every(2, video.frames))


MATRIX_PRODUCT = """
import sys
import threading
import pbd_ray.data.video
import torch
order = list(sys.modules)
assert order.index("torch") < order.index("decord"), "decord was loaded first"
product = torch.full((256, 256), 0.5) @ torch.full((256, 256), 2.0)
assert bool((product == 256).all())
print("done")
"""


def test_decord_does_not_take_over_matrix_products() -> None:
    """Loaded before torch it opens libnvblas, which then owns `sgemm` and crashes in it without a GPU."""
    result = subprocess.run(
        [sys.executable, "-c", MATRIX_PRODUCT], capture_output=True, text=True, timeout=300, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr
