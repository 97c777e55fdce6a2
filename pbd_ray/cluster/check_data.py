"""From videos and annotations to an index, statistics and a recipe: what `jobs/check_data.py` runs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml

from pbd_ray.cluster.backend import backend
from pbd_ray.cluster.monitoring import say
from pbd_ray.cluster.output import check_output
from pbd_ray.cluster.preflight import findings
from pbd_ray.config import ConfigError, DataConfig, Execution, Experiment, Recipe
from pbd_ray.data.annotation_forms import Problem, read_written
from pbd_ray.data.annotations import Annotations, annotations_to_json, split
from pbd_ray.data.checking import check_data, unchecked_videos
from pbd_ray.data.grid_choice import choose_grid
from pbd_ray.data.json_file import AnnotationError
from pbd_ray.data.recipe_draft import SMALL, VIDEOMAE_S, draft_recipe
from pbd_ray.data.source import VideoSource
from pbd_ray.data.statistics import statistics_of
from pbd_ray.data.subsets import TRAINING, assign_subsets
from pbd_ray.data.unannotated import find_videos
from pbd_ray.report.data_statistics import draw_statistics, statistics_text
from pbd_ray.report.output import write_files

_SHOWN = 20
"""Problems that are printed; all are in problems.txt."""


def run_check(
    root: str,
    annotations: str,
    output: Path,
    test_names: Sequence[str] = (),
    small: bool = False,
    where: Literal["local", "ray"] = "local",
) -> None:
    """Write what `jobs/check_data.py` promises, and print the statistics and the problems.

    Args:
        root: folder of the videos.
        annotations: file or folder, of any form of `data/annotation_forms.py`.
        test_names: the subsets for testing; empty: told from their names.
        small: the recipe is of a detector that a laptop trains in minutes.
        where: the videos are looked at here, or by tasks on a cluster.

    Raises:
        UserError: the data cannot be used at all; nothing is written then.
    """
    check_output(output)
    index = output.absolute() / "annotations.json"
    if index.exists() and Path(annotations).exists() and index.samefile(annotations):
        raise ConfigError(f"--output {output}: its annotations.json is what is to be checked: name another")
    if not Path(root).is_dir():
        raise ConfigError(f"--videos {root}: not a folder")
    written = read_written(annotations)
    assigned = assign_subsets(written, annotations, test_names)
    say(f"{annotations}: {written.form}, {len(written.videos)} videos")
    for note in assigned.notes:
        say(note)
    found = find_videos([root])
    data_root = str(Path(root).resolve())
    files = [Path(video.path).relative_to(data_root).as_posix() for video in found.videos]
    videos = unchecked_videos(written, assigned.subsets, files)
    recipe = _looking(data_root, where)
    with backend(recipe, workers=1):
        looked = list(findings(recipe, videos, VideoSource(data_root)))
    checked = check_data(written, looked, annotations)
    problems = (*assigned.problems, *checked.problems, *_unnamed(files, [v.path for v in videos], root))
    statistics = statistics_of(checked.annotations)
    training, backbone = checked.annotations.subset(TRAINING), SMALL if small else VIDEOMAE_S
    choice = choose_grid(training, checked.short_side_pixels, backbone.largest_pixels)
    name = output.absolute().name or "own_data"
    draft = draft_recipe(checked.annotations, choice, backbone, name, data_root, str(index))
    _require_instances(checked.annotations, Recipe.model_validate(yaml.safe_load(draft)), annotations)
    contents = {
        index.name: _json(annotations_to_json(checked.annotations, "pbd_ray 1")),
        "recipe.yaml": draft.encode(),
        "statistics.json": _json(asdict(statistics)),
        "statistics.png": draw_statistics(statistics),
        "problems.txt": "".join(f"{problem.line}\n" for problem in problems).encode(),
    }
    if (output / "recipe.yaml").exists():
        del contents["recipe.yaml"]
        say(f"{output}/recipe.yaml stays as it is: delete it for a new draft")
    write_files(output, contents)
    print(f"\n{statistics_text(statistics)}\n")
    _print_problems(problems, output)
    say(f"{output}: {', '.join(contents)}")


def _require_instances(annotations: Annotations, recipe: Recipe, path: str) -> None:
    """mAP of a part without an instance is undefined: better said now than after the first epochs.

    Raises:
        AnnotationError: the recipe's draw, or the user's own subset, leaves a part without any.
    """
    data = recipe.experiment.data
    for name, part in split(annotations, data, recipe.experiment.seed).parts.items():
        if not any(len(video.labels) for video in part.videos):
            drawn = "" if data.selection_subset else ", as they are drawn: name a third subset 'selection'"
            raise AnnotationError(f"{path}: no instance in the {len(part.videos)} {name} videos{drawn}")


def _looking(data_root: str, where: Literal["local", "ray"]) -> Recipe:
    cpus = (os.cpu_count() or 1) if where == "local" else 1
    execution = Execution(data_root=data_root, backend=where, cpus_per_worker=cpus, cache_gigabytes=0)
    return Recipe(experiment=Experiment(name="check_data", data=DataConfig()), execution=execution)


def _unnamed(files: Sequence[str], named: Sequence[str], root: str) -> tuple[Problem, ...]:
    more = sorted(set(files) - set(named))
    if not more:
        return ()
    line = f"{root}: {len(more)} video files that no annotation names, the first is {more[0]!r}"
    return (Problem("files without annotation", line),)


def _print_problems(problems: Sequence[Problem], output: Path) -> None:
    kinds = Counter(problem.kind for problem in problems)
    counts = f": {', '.join(f'{kind} {count}' for kind, count in kinds.items())}" if kinds else ""
    say(f"{len(problems)} problems{counts}")
    for problem in problems[:_SHOWN]:
        print(f"  {problem.line}")
    if len(problems) > _SHOWN:
        print(f"  ... and {len(problems) - _SHOWN} more in {output / 'problems.txt'}")


def _json(value: Any) -> bytes:
    return f"{json.dumps(value, indent=1, allow_nan=False)}\n".encode()
