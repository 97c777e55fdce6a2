"""What the machine gives: its matrix products at the shapes of a case's blocks, and memory in use."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.scoring_cases import Case, videomae_s
from benchmarks.scoring_rounds import BLOCKS, Round
from pbd_ray.compression.scoring import score_videos
from pbd_ray.config import DetectorConfig
from pbd_ray.metrics.cost import window_macs

REPEATS = 30


def block_products(config: DetectorConfig, windows: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the factors of every matrix product in one block's forward of `windows` windows."""
    backbone, grid = config.backbone, config.grid
    dim, heads = backbone.embed_dim, backbone.num_heads
    hidden, width = int(dim * backbone.mlp_ratio), dim // heads
    chunks = windows * grid.window_frames // backbone.chunk_frames
    rows = grid.crop_pixels // backbone.patch_pixels
    tokens = backbone.chunk_frames // backbone.tubelet_frames * rows**2
    linear = [(dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)]
    return [
        *(((chunks * tokens, factor[0]), factor) for factor in linear),
        ((chunks * heads, tokens, width), (chunks * heads, width, tokens)),
        ((chunks * heads, tokens, tokens), (chunks * heads, tokens, width)),
    ]


def matmul_limit(case: Case) -> float:
    """GFLOP/s of torch.matmul in float32 over the products of a block, each at its quickest repeat."""
    config, windows = case.recipe.experiment.detector, case.windows_per_video
    macs, seconds = 0, 0.0
    with torch.inference_mode():
        for left, right in block_products(config, windows):
            first, second = torch.randn(left), torch.randn(right)
            best = float("inf")
            for _ in range(REPEATS):
                began = time.thread_time()
                torch.matmul(first, second)
                best = min(best, time.thread_time() - began)
            seconds += best
            macs += first.numel() * right[-1]
    assert macs == windows * block_macs(case)
    return 2e-9 * macs / seconds


def achieved(case: Case, measured: Round) -> float:
    """GFLOP/s of a round's block forwards: all that a block does, over its matrix products."""
    return 2e-9 * block_macs(case) * measured.block_forwards / measured.stage_seconds[BLOCKS]


def block_macs(case: Case) -> int:
    """Multiply-accumulates of one window through one block."""
    config, blocks = case.recipe.experiment.detector, case.student.kept_blocks
    return next(iter(window_macs(config, blocks, num_classes=1).blocks.values()))


def peak_bytes(root: Path, candidates: int) -> tuple[int, int]:
    """Memory of a process of its own that scores one video of the VideoMAE-S shape for its first
    `candidates`: after it has detected once with the undropped student, and at most."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, root, candidates).result()


def _peak(root: Path, candidates: int) -> tuple[int, int]:
    torch.set_num_threads(1)
    case = videomae_s(root)
    student, job = case.detector(case.student), case.job(case.student.kept_blocks[:candidates])
    score_videos(case.job(()), student, None, case.videos.videos[:1])
    before = _status_bytes("VmRSS")
    score_videos(job, student, None, case.videos.videos[:1])
    return before, _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    """Of this process alone: what getrusage gives is at least what the parent had when it forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
