"""A whole detector of OpenTAD as the teacher of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pbd_ray.cluster.inputs import given_teacher
from pbd_ray.config import ConfigError, Recipe, UserError, load_recipe
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import load_split
from pbd_ray.detector.bundle import bundle_from_files, save_bundle
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.opentad import to_opentad

TINY = str(Path(__file__).parents[1] / "recipes" / "tiny.yaml")


def theirs(recipe: Recipe, split: Split, num_classes: int | None = None) -> Detector:
    detector = Detector(recipe.experiment.detector, num_classes or len(split.fit.classes))
    for parameter in detector.parameters():
        nn.init.normal_(parameter, std=0.1)
    return detector


def recipe_with(source: Path, *overrides: str) -> tuple[Recipe, Split]:
    recipe = load_recipe(TINY, [f"teacher.source={source}", *overrides])
    return recipe, load_split(recipe, print)


def checkpoint(path: Path, detector: Detector) -> Path:
    state = {f"module.{name}": value for name, value in to_opentad(detector).items()}
    torch.save({"epoch": 59, "state_dict_ema": state}, path)
    return path


def named(tmp_path: Path) -> tuple[Recipe, Split]:
    _, split = recipe_with(tmp_path)
    return recipe_with(tmp_path / "epoch_59.pth", f"data.classes=[{','.join(split.fit.classes)}]")


def test_checkpoint_of_opentad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, split = named(tmp_path)
    detector = theirs(recipe, split)
    checkpoint(tmp_path / "epoch_59.pth", detector)
    before = torch.get_rng_state()
    files = given_teacher(recipe, split)
    assert torch.equal(torch.get_rng_state(), before)
    assert files is not None
    bundle = bundle_from_files(files)
    assert bundle.classes == split.fit.classes
    assert bundle.facts == {"imported_from": "epoch_59.pth"}
    ours = bundle.detector.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in detector.state_dict().items())
    assert "tensors loaded" in capsys.readouterr().out


def test_the_order_of_its_classes_must_be_said(tmp_path: Path) -> None:
    recipe, split = recipe_with(tmp_path / "epoch_59.pth")
    checkpoint(tmp_path / "epoch_59.pth", theirs(recipe, split))
    with pytest.raises(ConfigError, match=r"experiment\.data\.classes is None, but teacher") as error:
        given_teacher(recipe, split)
    assert "category_idx.txt" in str(error.value) and "\n" not in str(error.value)


def test_another_number_of_classes(tmp_path: Path) -> None:
    recipe, split = named(tmp_path)
    checkpoint(tmp_path / "epoch_59.pth", theirs(recipe, split, len(split.fit.classes) + 1))
    with pytest.raises(UserError, match=r"'head\.class_output\.weight' has shape"):
        given_teacher(recipe, split)


def test_a_detector_that_has_lost_blocks(tmp_path: Path) -> None:
    recipe, split = named(tmp_path)
    pruned = Detector(recipe.experiment.detector, len(split.fit.classes), [0, 1, 3])
    checkpoint(tmp_path / "epoch_59.pth", pruned)
    with pytest.raises(UserError, match=r"blocks\.2\..* is missing"):
        given_teacher(recipe, split)


def test_a_bundle_still_is_a_teacher(tmp_path: Path) -> None:
    recipe, split = recipe_with(tmp_path / "bundle")
    save_bundle(tmp_path / "bundle", theirs(recipe, split), split.fit.classes, {})
    files = given_teacher(recipe, split)
    assert files is not None and bundle_from_files(files).classes == split.fit.classes


def test_nothing_there(tmp_path: Path) -> None:
    recipe, split = recipe_with(tmp_path / "nosuch")
    with pytest.raises(ConfigError, match="not a bundle"):
        given_teacher(recipe, split)
