"""Peak memory of jobs/detect.py: that of a few windows, however long the video."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pbd_ray.config import load_recipe
from pbd_ray.detector.bundle import save_bundle
from pbd_ray.detector.detector import Detector

PIXELS = 160
OVERRIDES = (
    "detector.grid.stride_frames=1",
    f"detector.grid.test_short_side_pixels={PIXELS}",
    f"detector.grid.crop_pixels={PIXELS}",
    f"detector.backbone.patch_pixels={PIXELS // 2}",  # four tokens a frame: it is the frames that count
    "detector.backbone.depth=1",
    "detector.postprocess.pre_nms_top=10",
)
DETECT = """
from pathlib import Path
from pbd_ray.cluster.detect import run_detection

bundle, video, output = sys.argv[1:]
assert run_detection([bundle], [video], ["window_batch=2"], None, Path(output)) == 0
print(json.dumps(status_bytes("VmHWM")))
"""


def write_video(path: Path, frames: int) -> Path:
    """Noise of a few pixels, coded small and read large."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(frames):
            pixels = np.kron(
                rng.integers(256, size=(3, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8)
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_video(
    tiny_recipe: str, tmp_path: Path, measured_memory: Callable[..., Any]
) -> None:
    config = load_recipe(tiny_recipe, OVERRIDES).experiment.detector
    save_bundle(tmp_path / "bundle", Detector(config, 2), ("a", "b"), {})
    short, long = 200, 2000

    def peak_bytes(frames: int) -> int:
        video = write_video(tmp_path / f"{frames}.mp4", frames)
        return int(measured_memory(DETECT, str(tmp_path / "bundle"), str(video), str(tmp_path / str(frames))))

    pixel_bytes = (long - short) * 3 * PIXELS**2
    assert peak_bytes(long) - peak_bytes(short) < pixel_bytes / 4
