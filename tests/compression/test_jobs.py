"""What a fine-tuning run is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from pbd_ray.compression.blocks import Model
from pbd_ray.compression.jobs import TEACHER_ROUND, alignment_job, initial_model, teacher_job
from pbd_ray.config import ConfigError, Recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import VideoSource

NOWHERE = VideoSource("nowhere")


def same(a: Model, b: Model) -> bool:
    return all(np.array_equal(a.weights[name], value) for name, value in b.weights.items())


def test_alignment(make_recipe: Callable[..., Recipe], split: Split, student: Model, teacher: Model) -> None:
    recipe = make_recipe()
    job = alignment_job(recipe, split, NOWHERE, 2, student, teacher)
    assert {video.subset for video in job.selection.videos} == {"selection"}
    assert {video.subset for video in job.fit.videos} == {"fit"}
    assert (job.round, job.grid_index, job.learning_rate) == (2, 0, 1e-4)
    assert (job.student, job.teacher, job.config) == (student, teacher, recipe.experiment.alignment)


def test_the_second_half_of_the_rounds(
    make_recipe: Callable[..., Recipe], split: Split, student: Model, teacher: Model
) -> None:
    """The schedule follows from how many blocks the student has lost."""
    lost = len(teacher.kept_blocks) - len(student.kept_blocks)
    for most, epochs in ((2 * lost, 3), (2 * lost - 1, 4)):
        recipe = make_recipe(f"stopping.max_drops={most}", "alignment.later_epochs=4")
        job = alignment_job(recipe, split, NOWHERE, 2, student, teacher)
        assert job.config.optimizer.epochs == epochs


def test_teacher(make_recipe: Callable[..., Recipe], split: Split) -> None:
    """Everything trains, nothing guides, nothing has been dropped."""
    recipe = make_recipe("teacher.select_every_epochs=2")
    job = teacher_job(recipe, split, NOWHERE, print)
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
    first = initial_model(make_recipe(), 4, print)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same(initial_model(make_recipe(), 4, print), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(initial_model(make_recipe("seed=1"), 4, print), first)
    moving = initial_model(make_recipe("teacher.start=motion"), 4, print)
    different = {
        name for name, value in moving.weights.items() if not np.array_equal(value, first.weights[name])
    }
    assert different == {"backbone.patch_embed.weight", "backbone.position_table"}


def test_pretrained_weights_must_be_named(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError) as error:
        initial_model(make_recipe("teacher.start=pretrained"), 4, print)
    assert "execution.pretrained_weights" in str(error.value) and "\n" not in str(error.value)


def test_pretrained_weights_start_the_backbone(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """And the log says what became of the file's tensors."""
    recipe = make_recipe("teacher.start=pretrained", f"pretrained_weights={tmp_path / 'vit.safetensors'}")
    shape = recipe.experiment.detector.backbone
    vit = VisionTransformer(
        img_size=2 * shape.patch_pixels,
        patch_size=shape.patch_pixels,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        mlp_ratio=shape.mlp_ratio,
        num_classes=5,
    )
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    said: list[str] = []
    model = initial_model(recipe, 4, said.append)
    torch.testing.assert_close(
        torch.as_tensor(model.weights["backbone.blocks.3.mlp.fc1.weight"]), vit.blocks[3].mlp.fc1.weight.data
    )
    assert len(said) == 1 and "2 ignored: the classifier of the pretraining data set" in said[0]
