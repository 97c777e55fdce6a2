"""What a fine-tuning run is told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pbd_ray.compression.blocks import Model
from pbd_ray.compression.jobs import TEACHER_ROUND, alignment_job, initial_model, teacher_job
from pbd_ray.config import ConfigError, Recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import VideoSource

NOWHERE = VideoSource("nowhere")


def same(a: Model, b: Model) -> bool:
    return all(np.array_equal(a.weights[name], value) for name, value in b.weights.items())


@pytest.mark.parametrize(("protocol", "subset"), [("false", "selection"), ("true", "test")])
def test_alignment(
    make_recipe: Callable[..., Recipe],
    split: Split,
    student: Model,
    teacher: Model,
    protocol: str,
    subset: str,
) -> None:
    """The paper's protocol chooses the epoch on test videos; ours never."""
    recipe = make_recipe(f"paper_protocol={protocol}")
    job = alignment_job(recipe, split, NOWHERE, 2, student, teacher)
    assert {video.subset for video in job.selection.videos} == {subset}
    assert {video.subset for video in job.fit.videos} == {"fit"}
    assert (job.round, job.grid_index, job.learning_rate) == (2, 0, 1e-4)
    assert (job.student, job.teacher, job.config) == (student, teacher, recipe.experiment.alignment)


def test_teacher(make_recipe: Callable[..., Recipe], split: Split) -> None:
    """Everything trains, nothing guides, nothing has been dropped."""
    recipe = make_recipe("teacher.select_every_epochs=2")
    job = teacher_job(recipe, split, NOWHERE)
    assert job.teacher is None and job.round == TEACHER_ROUND
    assert job.student.kept_blocks == (0, 1, 2, 3, 4)
    assert (job.config.trainable, job.config.feature_loss, job.config.prediction_loss) == (
        "full",
        False,
        False,
    )
    assert job.learning_rate == recipe.experiment.teacher.backbone_lr == 1e-3
    assert job.config.optimizer == recipe.experiment.teacher.optimizer
    assert job.config.select_every_epochs == 2


def test_initial_model(make_recipe: Callable[..., Recipe]) -> None:
    """Drawn by the recipe's seed alone, and torch's own generator is left alone."""
    torch.manual_seed(1)
    first = initial_model(make_recipe(), 4)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same(initial_model(make_recipe(), 4), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(initial_model(make_recipe("seed=1"), 4), first)
    moving = initial_model(make_recipe("teacher.start=motion"), 4)
    different = {
        name for name, value in moving.weights.items() if not np.array_equal(value, first.weights[name])
    }
    assert different == {"backbone.patch_embed.weight", "backbone.position_table"}


def test_pretrained_weights_must_be_named(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError) as error:
        initial_model(make_recipe("teacher.start=dinov2"), 4)
    assert "execution.pretrained_weights" in str(error.value) and "\n" not in str(error.value)
