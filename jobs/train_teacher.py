"""Fit the uncompressed detector of a recipe and write its bundle.

    ray job submit --working-dir . -- python jobs/train_teacher.py RECIPE --output DIR [key=value ...]

A bundle is a directory of config.json and model.safetensors: name it as experiment.teacher.source.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from pbd_ray.config import UserError, load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="the bundle to write")
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        from pbd_ray.cluster.run import run_teacher

        overrides = shlex.join(arguments.overrides)
        run_teacher(recipe, arguments.output, f"jobs/train_teacher.py {arguments.recipe} {overrides}".strip())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
