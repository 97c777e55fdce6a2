"""Compress a temporal action detector as a recipe says.

    ray job submit --working-dir . -- python jobs/compress.py RECIPE [key=value ...]

RECIPE is a shipped name or a YAML file. The same command on the same run_dir goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys

from pbd_ray.cluster.monitoring import exit_status
from pbd_ray.config import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--print-config", action="store_true", help="print the whole recipe and stop")
    arguments = parser.parse_intermixed_args()
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.print_config:
        print(recipe.to_yaml(), end="")
        return
    from pbd_ray.cluster.run import run_compression

    run_compression(recipe)


if __name__ == "__main__":
    sys.exit(main())
