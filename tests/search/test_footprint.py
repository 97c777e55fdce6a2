"""What a run writes at most, against what is really written."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from safetensors.torch import save

from pbd_ray.compression.finetune import FineTuning
from pbd_ray.compression.jobs import initial_model
from pbd_ray.config import load_recipe
from pbd_ray.data.source import load_split
from pbd_ray.search.footprint import (
    bundle_bytes,
    checkpoint_bytes,
    compression_footprint,
    teacher_checkpoint_bytes,
)


@pytest.mark.parametrize("trainable", ["lora", "full", "head", "lora_only"])
def test_a_checkpoint(tiny_recipe: str, trainable: str) -> None:
    """One of a run after its first step, without learning rates and without the second that replaces it."""
    recipe = load_recipe(tiny_recipe, [f"alignment.trainable={trainable}", "alignment.learning_rates=[1e-3]"])
    experiment, model = recipe.experiment, initial_model(recipe, 4, print)
    run = FineTuning(model, None, experiment.detector, 4, experiment.alignment, 1e-3, 1, (0,))
    for parameter in run.student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    bound = checkpoint_bytes(experiment, experiment.alignment, 4) / 2
    assert 0.7 * bound < len(save(run.state())) <= bound


def test_nothing_trains(tiny_recipe: str) -> None:
    recipe = load_recipe(tiny_recipe, ["alignment.trainable=none", "alignment.learning_rates=[]"])
    assert checkpoint_bytes(recipe.experiment, recipe.experiment.alignment, 4) == 0


def test_the_shipped_bundle() -> None:
    shipped = resources.files("pbd_ray") / "demo_teacher" / "model.safetensors"
    bound = bundle_bytes(load_recipe("demo").experiment, 4)
    assert 0.9 * bound < len(shipped.read_bytes()) <= bound


def test_a_compression(tiny_recipe: str) -> None:
    """6 fit, 3 selection and 4 test videos, 4 blocks, 2 rounds, at most 200 detections a video."""
    recipe = load_recipe(tiny_recipe)
    experiment, split = recipe.experiment, load_split(recipe, print)
    found = compression_footprint(experiment, split)
    assert found.bundles == 3 * bundle_bytes(experiment, 4)
    assert found.tables == 48 * 200 * (2 * 6 * 5 + 3 * 7)
    assert found.checkpoints == max(
        checkpoint_bytes(experiment, experiment.alignment, 4), teacher_checkpoint_bytes(experiment, 4)
    )
    assert found.total == found.bundles + found.checkpoints + found.tables
    given = load_recipe(tiny_recipe, ["scoring.drops=[1,2]"]).experiment
    assert compression_footprint(given, split).tables == 48 * 200 * 3 * 7


def test_rounds_that_may_be_rolled_back_count(tiny_recipe: str) -> None:
    """Two attempts at each of two depths: five bundles and evaluations, but two sweeps of candidates."""
    recipe = load_recipe(tiny_recipe, ["stopping.tolerance=0.1"])
    experiment, split = recipe.experiment, load_split(recipe, print)
    found = compression_footprint(experiment, split)
    assert found.bundles == 5 * bundle_bytes(experiment, 4)
    assert found.tables == 48 * 200 * (2 * 6 * 5 + 5 * 7)
