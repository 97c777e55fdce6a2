"""What runs in every Ray Train worker: one fine-tuning run, a checkpoint after every epoch.

A checkpoint is a directory of `state.safetensors` (everything the run needs to go on, the best model
so far included) and `history.json` (all epochs); nothing is pickled. Only the newest is kept.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pbd_ray.compression.epochs import EpochReport, history_from_json, history_to_json, run_epochs
from pbd_ray.compression.finetune import Collective, Diverged, FineTuning
from pbd_ray.compression.jobs import FineTuneJob
from pbd_ray.config import Recipe
from pbd_ray.data.source import local_source

STATE, HISTORY = "state.safetensors", "history.json"


@dataclasses.dataclass(frozen=True)
class TrainCollective:
    """`finetune.Collective` over torch.distributed, as Ray Train set it up."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, value: Tensor) -> Tensor:
        if self.world_size == 1:
            return value
        # Counts and losses are float64; nccl sums tensors of the GPU only.
        total = value.to(self.device)
        torch.distributed.all_reduce(total)
        return total.to(value.device)

    def gather(self, table: pa.Table) -> pa.Table:
        if self.world_size == 1:
            return table
        tables: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(tables, table)
        return pa.concat_tables(tables)


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`.

    Args:
        config: `job`, a reference to the FineTuneJob that all learning rates share, this run's
            `learning_rate` and `grid_index`, the `recipe`, and the number of epochs to train `until`.
    """
    recipe: Recipe = config["recipe"]
    torch.set_num_threads(recipe.execution.threads_per_worker)
    shared: FineTuneJob = ray.get(config["job"])
    job = dataclasses.replace(
        shared,
        learning_rate=config["learning_rate"],
        grid_index=config["grid_index"],
        source=local_source(recipe),
    )
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    collective = TrainCollective(context.get_world_rank(), context.get_world_size(), device)
    history, state = _resume()
    epochs = run_epochs(
        job,
        device=device,
        collective=collective,
        wrap=data_parallel(collective),
        history=history,
        state=state,
        until=config["until"],
    )
    try:
        for report, tuning in epochs:
            history.append(report)
            _report(report, history, tuning, collective)
    except Diverged as reason:
        ray.train.report({"diverged": str(reason), "epoch": len(history), "learning_rate": job.learning_rate})


def _resume() -> tuple[list[EpochReport], Mapping[str, Tensor] | None]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return [], None
    with checkpoint.as_directory() as directory:
        folder = Path(directory)
        return list(history_from_json((folder / HISTORY).read_text())), load_file(folder / STATE)


def _report(
    report: EpochReport, history: Sequence[EpochReport], tuning: FineTuning, collective: Collective
) -> None:
    """Rank 0 hands in metrics and checkpoint; the others take part in the barrier."""
    metrics = {
        "epoch": report.epoch,
        **{f"{group}_lr": rate for group, rate in tuning.rates().items()},
        **dataclasses.asdict(report.losses),
        "selection_map": report.selection_map,
        "selection_average_map": report.selection_average_map,
        **dataclasses.asdict(report.cost),
    }
    if collective.rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file(tuning.state(), Path(folder) / STATE)
        (Path(folder) / HISTORY).write_text(history_to_json(history))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def data_parallel(collective: TrainCollective) -> Callable[[nn.Module], nn.Module]:
    """Wraps a student in DDP where there are several ranks."""

    def wrap(module: nn.Module) -> nn.Module:
        if collective.world_size == 1:
            return module
        devices = [collective.device] if collective.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)

    return wrap
