"""Compress a temporal action detector as a recipe says.

    ray job submit --working-dir . -- python jobs/compress.py RECIPE [key=value ...]

RECIPE is a shipped name or a YAML file. The same command on the same run_dir goes on where it stopped.

    python jobs/compress.py RECIPE --plan               # what it will take: time, memory, disk, cost
    python jobs/compress.py --verify RUN_DIR            # does every hash hold? exit status 1 if not
    python jobs/compress.py --explain ROUND RUN_DIR     # why that block went, and what it cost
"""

from __future__ import annotations

import argparse
import sys

from pbd_ray.cluster.monitoring import exit_status
from pbd_ray.cluster.output import with_lasting_run_dir
from pbd_ray.config import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--print-config", action="store_true", help="print the whole recipe and stop")
    instead.add_argument(
        "--plan", action="store_true", help="measure on a few videos what the run will take and stop"
    )
    instead.add_argument("--verify", metavar="RUN_DIR", help="check every hash of a run and stop")
    instead.add_argument(
        "--explain", metavar=("ROUND", "RUN_DIR"), nargs=2, help="print why a round's block went and stop"
    )
    arguments = parser.parse_intermixed_args()
    asks = arguments.verify is not None or arguments.explain is not None
    if asks == (arguments.recipe is not None):
        parser.error("--verify and --explain take no RECIPE" if asks else "RECIPE is missing")
    return exit_status(lambda: ask(arguments) if asks else run(arguments))


def ask(arguments: argparse.Namespace) -> int:
    from pbd_ray.cluster.reading import print_explanation, print_problems

    if arguments.verify is not None:
        return print_problems(arguments.verify)
    round, run_dir = arguments.explain
    print_explanation(run_dir, round)
    return 0


def run(arguments: argparse.Namespace) -> int:
    recipe = with_lasting_run_dir(load_recipe(arguments.recipe, arguments.overrides))
    if arguments.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    from pbd_ray.cluster.reading import refuse_early

    refuse_early(recipe)  # torch and Ray take seconds to load
    if arguments.plan:
        from pbd_ray.cluster.planning import run_plan

        run_plan(recipe)
        return 0
    from pbd_ray.cluster.run import run_compression

    run_compression(recipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
