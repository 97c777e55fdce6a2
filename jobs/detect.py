"""Find actions in any video: detections as JSON and CSV, and a timeline picture a video.

    python jobs/detect.py --bundle DIR VIDEO|FOLDER ... --output DIR
    python jobs/detect.py --bundle DIR --beside TEACHER VIDEO ... --output DIR [threads_per_worker=4 ...]

One video runs in this process, several on Ray; `key=value` are values of the recipes' `execution` part.
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
    parser.add_argument("videos", metavar="VIDEO|FOLDER|key=value", nargs="+")
    parser.add_argument("--bundle", metavar="DIR", required=True, help="the detector")
    parser.add_argument("--beside", metavar="DIR", help="a second detector of the same classes")
    parser.add_argument(
        "--min-score",
        metavar="S",
        type=float,
        help="draw what has at least this score; default: the best 20",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True)
    arguments = parser.parse_intermixed_args()
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    from pbd_ray.cluster.detect import run_detection

    overrides = [text for text in arguments.videos if "=" in text and not Path(text).exists()]
    paths = [text for text in arguments.videos if text not in overrides]
    bundles = [directory for directory in (arguments.bundle, arguments.beside) if directory is not None]
    return run_detection(bundles, paths, overrides, arguments.min_score, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
