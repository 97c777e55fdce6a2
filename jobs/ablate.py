"""The experiments of the paper's supplement (tables A to G) on any recipe, with several seeds.

    ray job submit --working-dir . -- python jobs/ablate.py RECIPE [key=value ...] --output DIR

All runs start from one teacher. The same command on the same DIR goes on where it stopped; more tables or
seeds may be added. DIR/tables holds one CSV and one Parquet file a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

from pbd_ray.cluster.monitoring import exit_status
from pbd_ray.cluster.output import check_lasting
from pbd_ray.config import ConfigError, changed, load_recipe

Value = TypeVar("Value", int, float)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--output", metavar="DIR", required=True, help="path or URI, seen by all nodes")
    parser.add_argument("--tables", metavar="A,B,...", default="A,B,C,D,E,F,F4,G")
    parser.add_argument("--seeds", metavar="N,N,...", default="0,1,2")
    parser.add_argument(
        "--full-rates", metavar="R,R,...", help="learning rates of full fine-tuning; a tenth of the recipe's"
    )
    arguments = parser.parse_intermixed_args()
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from pbd_ray.search.ablation import ablation_recipe
    from pbd_ray.search.ablation_tables import plan_tables

    check_lasting("--output", arguments.output)
    base = ablation_recipe(changed(recipe, {"run_dir": arguments.output}))
    rates = arguments.full_rates
    plan = plan_tables(
        base,
        arguments.tables.split(","),
        numbers("--seeds", arguments.seeds, int),
        None if rates is None else numbers("--full-rates", rates, float),
    )
    from pbd_ray.cluster.reading import refuse_early

    refuse_early(base)  # torch and Ray take seconds to load
    from pbd_ray.cluster.ablation import run_ablation

    run_ablation(base, plan)


def numbers(option: str, text: str, kind: Callable[[str], Value]) -> list[Value]:
    """Values of an option that are separated by commas."""
    try:
        return [kind(value) for value in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers separated by commas") from None


if __name__ == "__main__":
    sys.exit(main())
