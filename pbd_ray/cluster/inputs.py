"""The teacher that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch

from pbd_ray.cluster.monitoring import say
from pbd_ray.config import ConfigError, Recipe
from pbd_ray.data.annotations import Split
from pbd_ray.detector.bundle import FILES, Bundle, bundle_files, bundle_from_files
from pbd_ray.detector.detector import Detector
from pbd_ray.detector.opentad import load_opentad

SHIPPED = "demo_teacher"


def given_teacher(recipe: Recipe, split: Split) -> Mapping[str, bytes] | None:
    """Files of the teacher's bundle that the recipe names; None where the teacher is to be trained.

    Raises:
        UserError: no bundle or checkpoint there, or one of another architecture or other classes than the
            recipe's.
    """
    source = recipe.experiment.teacher.source
    files: Mapping[str, bytes]
    if source == "train":
        return None
    if source == "shipped":
        folder = resources.files("pbd_ray") / SHIPPED
        files = {name: (folder / name).read_bytes() for name in FILES}
    elif Path(source).is_file():
        files = imported_teacher(recipe, split, source)
    else:
        for name in FILES:
            if not Path(source, name).is_file():
                raise ConfigError(f"experiment.teacher.source: {source} has no {name}: not a bundle")
        files = {name: Path(source, name).read_bytes() for name in FILES}
    check_teacher(recipe, split, files, source)
    return files


def imported_teacher(recipe: Recipe, split: Split, source: str) -> Mapping[str, bytes]:
    """A whole detector's checkpoint from OpenTAD as a bundle of the recipe's detector.

    Raises:
        UserError: the file does not fit the recipe's detector, or it is not said which label is which class.
    """
    data, classes = recipe.experiment.data, split.fit.classes
    if data.classes != classes and not data.class_agnostic:
        # Sorted names would often be right, and a wrong order would only show as a poor mAP.
        raise ConfigError(
            f"experiment.data.classes is {data.classes and list(data.classes)}, but teacher {source} numbers "
            "its classes without names: list them in the order of its class map, "
            "data.classes=[$(paste -sd, category_idx.txt)]"
        )
    with torch.random.fork_rng(devices=[]):  # building draws initial weights; loading must not
        detector = Detector(recipe.experiment.detector, len(classes))
    report = load_opentad(detector, source)
    say(f"teacher from {report.text()}")
    return bundle_files(detector, classes, {"imported_from": Path(source).name})


def check_teacher(recipe: Recipe, split: Split, files: Mapping[str, bytes], source: str) -> None:
    """Refuse a bundle that is not a whole detector of the recipe's architecture and classes."""
    bundle = bundle_from_files(files, source)
    check_bundle(recipe, split, bundle, f"teacher {source}")
    if len(bundle.kept_blocks) != recipe.experiment.detector.backbone.depth:
        raise ConfigError(
            f"teacher {source}: blocks {list(bundle.kept_blocks)} only, not the uncompressed detector"
        )


def check_bundle(recipe: Recipe, split: Split, bundle: Bundle, who: str) -> None:
    """Refuse a detector, of whatever depth, that is not of the recipe's architecture and classes."""
    wanted = recipe.experiment.detector
    for part in ("grid", "backbone", "head", "postprocess"):
        ours, theirs = getattr(wanted, part), getattr(bundle.config, part)
        for key in type(ours).model_fields:
            if getattr(ours, key) != getattr(theirs, key):
                raise ConfigError(
                    f"{who}: {part}.{key} is {getattr(theirs, key)}, "
                    f"experiment.detector.{part}.{key} is {getattr(ours, key)}"
                )
    if tuple(bundle.classes) != tuple(split.fit.classes):
        raise ConfigError(f"{who}: classes {list(bundle.classes)}, data {list(split.fit.classes)}")
