from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from pbd_ray.data.video import (
    FrameReader,
    VideoError,
    VideoProbe,
    examine_video,
    probe_video,
    read_frames,
    slack,
)

Write = Callable[..., Path]

ODD = ("decord_flipping_a_pancake.mkv", "ntu_S001C001P001R001A001_rgb.avi", "v_Basketball_g01_c01.avi")


def decode_by_pyav(path: Path, width: int, height: int) -> NDArray[np.uint8]:
    """Every frame (T, H, W, 3): an independent decoder, resized by area."""
    with av.open(str(path)) as container:
        return np.stack(
            [
                frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
                for frame in container.decode(video=0)
            ]
        )


def levels(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    return frames[:, :, frames.shape[2] * 3 // 4 :].reshape(len(frames), -1).mean(1)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_the_frames_asked_for(write_video: Write, tmp_path: Path, name: str, codec: str) -> None:
    path = str(write_video(tmp_path / name, codec=codec))
    assert probe_video(path) == VideoProbe(frames=30, fps=10.0, width=64, height=48)
    indices = np.array([0, 4, 8, 29, 29, 3, 3, 17])
    frames = read_frames(path, indices, short_side=24)
    assert frames.dtype == np.uint8
    np.testing.assert_allclose(levels(frames), 7 * indices, atol=4)
    # the left half is brighter: neither mirrored nor skewed
    assert (frames[:, :, 4].mean((1, 2)) - frames[:, :, -5].mean((1, 2)) > 12).all()


@pytest.mark.parametrize(
    ("width", "height", "short_side", "expected"),
    [
        (64, 48, 48, (48, 64)),
        (
            64,
            48,
            24,
            (24, 32),
        ),  # rows of 32, 48, 96 and 144 pixels are padded to whole multiples of the width
        (64, 48, 36, (36, 48)),
        (64, 48, 72, (72, 96)),
        (48, 64, 48, (64, 48)),
        (48, 48, 48, (48, 48)),
        (48, 48, 16, (16, 16)),
        (66, 50, 33, (33, 44)),
        (320, 50, 7, (7, 45)),
        (64, 48, 101, (101, 135)),
    ],
)
def test_short_side_and_aspect(
    write_video: Write,
    tmp_path: Path,
    width: int,
    height: int,
    short_side: int,
    expected: tuple[int, int],
) -> None:
    path = write_video(tmp_path / "a.mp4", 6, width, height)
    frames = read_frames(str(path), np.arange(6), short_side)
    assert frames.shape == (6, *expected, 3)
    reference = decode_by_pyav(path, expected[1], expected[0])
    assert np.abs(frames.astype(int) - reference).mean() < 3
    backwards = read_frames(str(path), np.arange(6)[::-1].copy(), short_side)
    assert np.array_equal(backwards, frames[::-1])


@pytest.mark.parametrize(("frames", "beyond"), [(1, 2), (30, 2), (100, 5)])
def test_a_little_beyond_the_end_is_the_last_frame(
    write_video: Write, tmp_path: Path, frames: int, beyond: int
) -> None:
    path = str(write_video(tmp_path / "a.mp4", frames))
    assert slack(frames) == beyond
    last = read_frames(path, np.array([frames - 1]), 24)[0]
    read = read_frames(path, np.array([0, frames + beyond - 1]), 24)
    assert np.array_equal(read[1], last)
    with pytest.raises(VideoError, match=f"frame {frames + beyond} was asked for, the file has {frames}$"):
        read_frames(path, np.array([0, frames + beyond]), 24)


def test_a_file_that_is_not_the_annotated_one(write_video: Write, tmp_path: Path) -> None:
    reader = FrameReader(str(write_video(tmp_path / "a.mp4", 60)), 24)
    for annotated in (57, 60, 63):
        reader.check_frames(annotated)
    for annotated in (56, 64, 120, 1):
        with pytest.raises(
            VideoError, match=rf"a\.mp4: the file has 60 frames, its annotation says {annotated}$"
        ):
            reader.check_frames(annotated)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.mp4", None, "no such video file"),
        (".", None, "no such video file"),
        ("empty.mp4", b"", "the video file is empty (0 bytes)"),
        ("text.mp4", b"hello\n", "not a video, or without a video stream"),
        ("zeros.avi", bytes(10_000), "not a video, or without a video stream"),
    ],
)
def test_files_that_are_no_videos(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for use in (probe_video, lambda path: read_frames(path, np.arange(2), 24)):
        with pytest.raises(VideoError) as caught:
            use(str(path))
        message = str(caught.value)
        assert message.startswith(f"{path}: {expected}") and "\n" not in message


def test_sound_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for index in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * index
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    with pytest.raises(VideoError, match="without a video stream"):
        probe_video(str(path))


def test_a_stream_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "none.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoError, match="not a video, or without"):
        probe_video(str(path))


def test_damage_in_the_middle(shared: Path, tmp_path: Path) -> None:
    good = (shared / "data" / "arid_composed" / "videos" / "training_0000.mp4").read_bytes()
    middle = len(good) // 2
    path = tmp_path / "damaged.mp4"
    path.write_bytes(good[:middle] + bytes(20_000) + good[middle + 20_000 :])
    frames = probe_video(str(path)).frames  # the index at the file's end is whole
    with pytest.raises(VideoError) as caught:
        read_frames(str(path), np.arange(0, frames, 2), 32)
    assert str(caught.value) == f"{path}: its frames cannot be decoded; the file may be damaged or incomplete"
    path.write_bytes(good[:middle])  # an interrupted copy: no index
    with pytest.raises(VideoError, match=r"may be damaged or incomplete$"):
        probe_video(str(path))


def test_a_truncated_container_has_fewer_frames(shared: Path, tmp_path: Path) -> None:
    good = (shared / "data" / "odd_videos" / ODD[0]).read_bytes()
    path = tmp_path / "short.mkv"
    path.write_bytes(good[: len(good) // 2])
    reader = FrameReader(str(path), 32)
    assert reader.probe.frames < 200
    with pytest.raises(VideoError, match="the file has"):
        reader.read(np.arange(310))
    with pytest.raises(VideoError, match="its annotation says 310"):
        reader.check_frames(310)


@pytest.mark.parametrize(
    ("name", "frames", "fps", "width", "height"),
    [(ODD[0], 310, 30.0, 426, 240), (ODD[1], 103, 30.0, 1920, 1080), (ODD[2], 141, 29.97003, 320, 240)],
)
def test_odd_videos(shared: Path, name: str, frames: int, fps: float, width: int, height: int) -> None:
    path = shared / "data" / "odd_videos" / name
    probe = probe_video(str(path))
    assert (probe.frames, probe.width, probe.height) == (frames, width, height)
    assert probe.fps == pytest.approx(fps)
    size = round(36 * width / height), 36
    reference = decode_by_pyav(path, *size)
    assert len(reference) == frames
    # Every start and stride reads the same frames, and the right ones, each time anew.
    everything = read_frames(str(path), np.arange(frames), 36)
    for start, stride in ((0, 1), (9, 4), (45, 4), (54, 4), (81, 4), (90, 4), (7, 31)):
        indices = np.arange(start, frames, stride)
        read = read_frames(str(path), indices, 36)
        assert np.array_equal(read, everything[indices])
        distance = np.stack(
            [
                np.abs(read.astype(np.int16) - reference[np.clip(indices + shift, 0, frames - 1)]).mean(
                    (1, 2, 3)
                )
                for shift in (0, -4, -1, 1, 4)
            ]
        )
        assert distance[0].max() < 3
        assert (distance[0] <= distance.min(0) + 0.2).all()


@pytest.mark.parametrize("name", ["arid", ODD[1], "narrow"])
def test_one_reader_goes_back_and_forth(shared: Path, write_video: Write, tmp_path: Path, name: str) -> None:
    if name == "arid":
        path = shared / "data" / "arid_composed" / "videos" / "validation_0003.mp4"
    elif name == "narrow":
        path = write_video(tmp_path / "a.mp4", 40, 48, 48)
    else:
        path = shared / "data" / "odd_videos" / name
    reader = FrameReader(str(path), 48)
    everything = read_frames(str(path), np.arange(reader.probe.frames), 48)
    generator = np.random.default_rng(0)
    for _ in range(4):
        indices = generator.integers(0, reader.probe.frames, 6)
        assert np.array_equal(reader.read(indices), everything[indices])


def test_every_real_video_opens_and_has_its_annotated_frames(shared: Path) -> None:
    folder = shared / "data" / "arid_composed"
    database = json.loads((folder / "annotations.json").read_text())["database"]
    for name, entry in database.items():
        probe = probe_video(str(folder / "videos" / f"{name}.mp4"))
        assert probe == VideoProbe(entry["frame"], entry["fps"], 160, 120)


def test_ffmpeg_is_silent(shared: Path) -> None:
    """Decoding in a process of its own, to see its standard error."""
    path = shared / "data" / "odd_videos" / ODD[2]
    code = (
        "import sys, numpy as np; from pbd_ray.data.video import read_frames; "
        "read_frames(sys.argv[1], np.arange(20), 24)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_one_frame(write_video: Write, tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "a.mp4", 1))
    assert examine_video(path).frames == 1
    frames = read_frames(path, np.array([0, 1, 2]), 24)
    assert np.array_equal(frames[0], frames[2])


def test_a_rotated_video_comes_upright(write_video: Write, tmp_path: Path) -> None:
    """A quarter turn clockwise in the header (the display matrix of its track), as phones write it."""
    path = write_video(tmp_path / "a.mp4", 5)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    lying = read_frames(str(path), np.arange(5), 48)
    content[matrix : matrix + 36] = turn
    path.write_bytes(content)
    assert examine_video(str(path)) == VideoProbe(frames=5, fps=10.0, width=48, height=64)
    upright = read_frames(str(path), np.arange(5), 48)
    assert np.abs(upright.astype(int) - np.rot90(lying, -1, axes=(1, 2))).max() <= 2


@pytest.mark.parametrize(("name", "fps"), [("a.mp4", 30 / 9.8), ("a.mkv", 10.0)])
def test_a_variable_frame_rate_is_not_seen(write_video: Write, tmp_path: Path, name: str, fps: float) -> None:
    """Ten frames in the first second, then one every half second: frames are counted, time stamps are not."""
    path = str(write_video(tmp_path / name, 30, ticks=[*range(10), *range(10, 110, 5)]))
    probe = examine_video(path)
    assert (probe.frames, probe.fps) == (30, pytest.approx(fps))
    np.testing.assert_allclose(levels(read_frames(path, np.arange(30), 24)), 7 * np.arange(30), atol=4)
