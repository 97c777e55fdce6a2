"""One rank of test_ddp.py: ten steps of alignment in float64 and in float32, printed as JSON.

python ddp_rank.py RANK WORLD_SIZE INIT_METHOD CASES
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed

from pbd_ray.cluster.train_loop import TrainCollective, data_parallel
from pbd_ray.compression.blocks import from_detector
from pbd_ray.compression.finetune import FineTuning
from pbd_ray.config import AlignmentConfig, BackboneConfig, DetectorConfig, GridConfig, HeadConfig
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.detector.detector import Detector

STEPS, WINDOWS, CLASSES = 10, 4, 3
CONFIG = DetectorConfig(
    grid=GridConfig(window_frames=32, feature_steps=32, crop_pixels=16),
    backbone=BackboneConfig(
        embed_dim=24, depth=4, num_heads=2, patch_pixels=8, position_table_pixels=16, drop_path=0.0
    ),
    head=HeadConfig(
        channels=16, num_heads=2, stem_layers=1, levels=3, drop_path=0.0,
        regression_ranges=((0, 4), (4, 8), (8, 10000)),
    ),
)  # fmt: skip


def global_batch(step: int) -> WindowBatch:
    """Windows with one to four instances, the last ending in padding: unequal shares for the ranks."""
    rng = np.random.default_rng(step)
    mask = torch.ones((WINDOWS, CONFIG.grid.feature_steps), dtype=torch.bool)
    mask[-1, -9:] = False
    segments = tuple(
        torch.tensor(np.sort(rng.uniform(0, 22, size=(1 + row, 2)), axis=1), dtype=torch.float32)
        for row in range(WINDOWS)
    )
    labels = tuple(torch.tensor(rng.integers(0, CLASSES, size=len(segment))) for segment in segments)
    frames = torch.tensor(rng.integers(0, 256, size=(WINDOWS, 3, 32, 16, 16), dtype=np.uint8))
    return WindowBatch(frames, mask, segments, labels, windows=(None,) * WINDOWS)  # type: ignore[arg-type]


def share(batch: WindowBatch, rank: int, world_size: int) -> WindowBatch:
    mine = slice(rank, None, world_size)
    return WindowBatch(
        batch.frames[mine], batch.mask[mine], batch.segments[mine], batch.labels[mine], batch.windows[mine]
    )


def train(collective: TrainCollective, dtype: torch.dtype, optimizer: dict[str, Any]) -> dict[str, Any]:
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    teacher = Detector(CONFIG, CLASSES)
    student = Detector(CONFIG, CLASSES, (0, 2, 3))
    student.load_state_dict({name: teacher.state_dict()[name] for name in student.state_dict()})
    options = {
        "epochs": 2,
        "schedule_epochs": 2,
        "warmup_epochs": 0.5,
        "head_lr": 1e-3,
        "batch_size": WINDOWS,
    }
    run = FineTuning(
        from_detector(student),
        from_detector(teacher),
        CONFIG,
        CLASSES,
        AlignmentConfig.model_validate({"optimizer": {**options, "batch_size": WINDOWS, "ema_warmup": True}}),
        backbone_lr=1e-3,
        steps_per_epoch=5,
        seed_key=(0, 1, 0),
        collective=collective,
        wrap=data_parallel(collective),
    )
    assert {parameter.dtype for parameter in run.student.parameters()} == {dtype}
    found: dict[str, Any] = {"losses": [], "counts": []}
    for step in range(STEPS):
        mine = share(global_batch(step), collective.rank, collective.world_size)
        found["counts"].append(asdict(run._global_counts(mine)))
        found["losses"].append(asdict(run.train_step(mine)))
    found["normalizer"] = float(run.normalizer)
    found["ema"] = {name: float(value.double().square().sum()) for name, value in run.ema.items()}
    return found


def main() -> None:
    rank, world_size, method, cases = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world_size)
    collective = TrainCollective(rank, world_size, torch.device("cpu"))
    print(json.dumps([train(collective, getattr(torch, case[0]), case[1]) for case in cases]))
    torch.distributed.destroy_process_group()


main()
