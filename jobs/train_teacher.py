"""Fit the uncompressed detector of a recipe and write its bundle.

    ray job submit --working-dir . -- python jobs/train_teacher.py RECIPE --output DIR [key=value ...]

A bundle is a directory of config.json and model.safetensors: name it as experiment.teacher.source.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from pbd_ray.cluster.monitoring import exit_status
from pbd_ray.config import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the bundle to write")
    arguments = parser.parse_intermixed_args()
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from pbd_ray.cluster.run import run_teacher

    command = shlex.join(["jobs/train_teacher.py", arguments.recipe, *arguments.overrides])
    run_teacher(recipe, arguments.output, command)


if __name__ == "__main__":
    sys.exit(main())
