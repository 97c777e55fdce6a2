"""Write a bundle for other programs, each export with a certificate of how near it comes to the bundle.

    python jobs/export.py --bundle DIR --format onnx --output DIR
    python jobs/export.py --bundle DIR --format onnx,opentad --output DIR RECIPE [key=value ...]

Every format gets a folder of its name. With a RECIPE and its data the certificates compare detections and mAP
on the selection videos, without one the outputs on random pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pbd_ray.cluster.monitoring import exit_status
from pbd_ray.config import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--bundle", metavar="DIR", required=True, help="the detector")
    parser.add_argument(
        "--format",
        metavar="NAME[,NAME]",
        required=True,
        help="safetensors (a bundle without gaps), opentad, huggingface (the backbone alone), onnx",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True)
    arguments = parser.parse_intermixed_args()
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    recipe = None if arguments.recipe is None else load_recipe(arguments.recipe, arguments.overrides)
    from pbd_ray.cluster.export import run_export

    run_export(arguments.bundle, arguments.format, arguments.output, recipe)


if __name__ == "__main__":
    sys.exit(main())
