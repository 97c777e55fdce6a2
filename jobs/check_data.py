"""Look at videos and annotations of your own; write a checked index, statistics, the problems, and a recipe.

    python jobs/check_data.py --videos FOLDER --annotations FILE|FOLDER --output DIR [--test-subset NAME ...]

Annotations are ActivityNet JSON, a CSV file (video,label,start,end and maybe subset; seconds), or a folder of
THUMOS14's text files (CLASS_val.txt, CLASS_test.txt). docs/own-data.md goes on from here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pbd_ray.cluster.monitoring import exit_status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", metavar="FOLDER", required=True, help="searched at any depth")
    parser.add_argument("--annotations", metavar="FILE|FOLDER", required=True)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True)
    parser.add_argument(
        "--test-subset", metavar="NAME", nargs="+", default=[], help="default: told from the subsets' names"
    )
    parser.add_argument(
        "--small", action="store_true", help="a recipe for a first try: a small detector, minutes on a laptop"
    )
    parser.add_argument(
        "--backend", choices=("local", "ray"), default="local", help="where the videos are looked at"
    )
    arguments = parser.parse_args()
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    from pbd_ray.cluster.check_data import run_check

    run_check(
        arguments.videos,
        arguments.annotations,
        arguments.output,
        arguments.test_subset,
        arguments.small,
        arguments.backend,
    )


if __name__ == "__main__":
    sys.exit(main())
