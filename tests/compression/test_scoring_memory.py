"""Peak memory of a scoring worker: that of one window batch, however many candidates there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pbd_ray.config import load_recipe
from pbd_ray.data import synthetic

DEPTH = 5
OVERRIDES = (
    "data.synthetic.fit_videos=1",
    "data.synthetic.selection_videos=1",
    "data.synthetic.test_videos=1",
    "data.synthetic.min_duration_seconds=20",
    "data.synthetic.max_duration_seconds=21",
    "detector.grid.window_frames=256",
    "detector.grid.stride_frames=1",
    "detector.grid.overlap=0.75",
    "detector.grid.test_short_side_pixels=32",
    "detector.grid.crop_pixels=32",
    "detector.backbone.embed_dim=96",
    f"detector.backbone.depth={DEPTH}",
    "detector.backbone.mlp_ratio=1",
    "detector.backbone.chunk_frames=4",
    "detector.backbone.patch_pixels=4",
)
WINDOW_BATCH = 4

SCORE = """
import json, sys
import torch
from pbd_ray.compression.scoring import ScoringJob, score_videos
from pbd_ray.config import load_recipe
from pbd_ray.data.source import VideoSource, inference_batches, load_split
from pbd_ray.detector.detector import Detector

recipe, data_root, candidates, window_batch, *overrides = sys.argv[1:]

def status_bytes(field):
    # Not getrusage: its maximum may be that of the process that started this one.
    line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.manual_seed(0)
recipe = load_recipe(recipe, overrides)
experiment, grid = recipe.experiment, recipe.experiment.detector.grid
video = load_split(recipe, print).fit.videos[0]
student = Detector(experiment.detector, 4).eval()
source, cpu = VideoSource(data_root), torch.device("cpu")
job = ScoringJob(experiment, "map", tuple(json.loads(candidates)), 1, source, int(window_batch), cpu)
before = status_bytes("VmRSS")
table = score_videos(job, student, None, [video])
peak = status_bytes("VmHWM")
with torch.inference_mode():
    batch = next(inference_batches(source, video, grid, int(window_batch)))
    batch_bytes = batch.frames.numel() * 4 + student.backbone.embed(batch.frames).nbytes
print(json.dumps([before, peak, batch_bytes, len(set(table["candidate"].to_pylist()))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_grow_with_candidates(tiny_recipe: str, video_cache: Path) -> None:
    settings = load_recipe(tiny_recipe, OVERRIDES).experiment.data.synthetic
    assert settings is not None
    data_root = str(synthetic.ensure(settings, video_cache))
    # One arena, and large blocks that go back to the system at once: what is free does not count as used.
    fixed = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "1000000",
        "MALLOC_TRIM_THRESHOLD_": "1000000",
    }

    def peak_bytes(candidates: list[int]) -> tuple[int, int]:
        arguments = [tiny_recipe, data_root, json.dumps(candidates), str(WINDOW_BATCH), *OVERRIDES]
        ended = subprocess.run(
            [sys.executable, "-c", SCORE, *arguments],
            env=os.environ | fixed,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        before, peak, batch_bytes, scored = json.loads(ended.stdout)
        assert scored == len(candidates) + 1
        assert peak - before > batch_bytes  # the peak is that of scoring, not of what came before
        return peak, batch_bytes

    one, batch_bytes = peak_bytes([0])
    every, _ = peak_bytes(list(range(DEPTH)))
    assert batch_bytes > 20e6
    assert every - one < batch_bytes
