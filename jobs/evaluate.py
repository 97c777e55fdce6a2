"""Evaluate detections: mAP, and a DETAD analysis of the errors, as JSON and as pictures.

    python jobs/evaluate.py --ground-truth GT.json --predictions P.json --subset S --output DIR
    ray job submit --working-dir . -- python jobs/evaluate.py --bundle DIR RECIPE [key=value ...] --output DIR

The first form needs no model; the second runs the bundle's detector on the recipe's test videos first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pbd_ray.cluster.monitoring import exit_status, say
from pbd_ray.cluster.output import check_output
from pbd_ray.config import ConfigError, load_recipe
from pbd_ray.metrics.detad_rules import load_rules
from pbd_ray.report.detection_report import Measures, evaluate_files, publish, tious_of


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--ground-truth", metavar="GT.json", help="annotations in ActivityNet's form")
    parser.add_argument("--predictions", metavar="P.json", help="detections in ActivityNet's results form")
    parser.add_argument("--subset", help="evaluate the videos of this subset")
    parser.add_argument("--bundle", metavar="DIR", help="run this detector first")
    parser.add_argument(
        "--tiou", metavar="A:B:STEP", help="thresholds (0.3:0.7:0.1; with --bundle the recipe's)"
    )
    parser.add_argument(
        "--detad", metavar="RULES", default="thumos14", help="thumos14, activitynet or a YAML file"
    )
    parser.add_argument("--replicates", metavar="N", type=int, default=1000, help="of the bootstrap; 0: none")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True)
    arguments = parser.parse_intermixed_args()
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    rules, replicates = load_rules(arguments.detad), arguments.replicates
    files = (arguments.ground_truth, arguments.predictions, arguments.subset)
    if replicates < 0:
        raise ConfigError(f"--replicates {replicates} is below 0")
    if arguments.bundle is None:
        if arguments.recipe is not None or None in files:
            raise ConfigError("give --ground-truth, --predictions and --subset, or --bundle DIR and a RECIPE")
        measures = Measures(tious_of(arguments.tiou or "0.3:0.7:0.1"), rules, replicates)
        publish(evaluate_files(*files, measures), arguments.output, say)
        return
    if arguments.recipe is None or files != (None, None, None):
        raise ConfigError(
            "--bundle goes with a RECIPE, and not with --ground-truth, --predictions or --subset"
        )
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    tious = tious_of(arguments.tiou) if arguments.tiou else recipe.experiment.evaluation.tious
    from pbd_ray.cluster.run import run_detector

    run_detector(recipe, arguments.bundle, Measures(tious, rules, replicates), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
