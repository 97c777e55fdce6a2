"""Peak memory of decoding for inference: that of a few windows, however long the video."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SHORT, LONG = 2500, 7500
"""Frames. Over the first 2,000 or so decoder and allocator take what they then keep."""
PIXELS = 96
DECODE = """
import json, sys
from pbd_ray.config import GridConfig
from pbd_ray.data.dataset import load_inference_batches
from pbd_ray.data.examine import examine
from pbd_ray.data.unannotated import find_videos

path, pixels, hoard = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "hoard"
grid = GridConfig(window_frames=32, stride_frames=1, test_short_side_pixels=pixels, crop_pixels=pixels)
found = find_videos([path])
video = examine(found.videos[0], found.root).video
kept = []
for batch in load_inference_batches(video, found.root, grid, 2):
    kept = [*kept, batch] if hoard else [batch]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps(int(peak.split()[1]) * 1024))
"""


@pytest.fixture
def grown(write_video: Callable[..., Path], tmp_path: Path) -> Callable[[str], int]:
    """Bytes by which the peak of a long video is over that of a short one."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")

    def peak(frames: int, how: str) -> int:
        path = tmp_path / f"{frames}.mp4"
        if not path.exists():
            write_video(path, frames, width=128, height=PIXELS)
        command = [sys.executable, "-c", DECODE, str(path), str(PIXELS), how]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return int(json.loads(ended.stdout.splitlines()[-1]))

    return lambda how: peak(LONG, how) - peak(SHORT, how)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_video(grown: Callable[[str], int]) -> None:
    """Nor would it go unseen if every batch were kept."""
    added = (LONG - SHORT) * 3 * PIXELS**2
    assert grown("pass") < added / 4
    assert grown("hoard") > added
