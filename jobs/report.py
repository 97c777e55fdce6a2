"""Make the report of a run anew, or ask what its run directory can tell without computing anything.

python jobs/report.py RUN_DIR                        # report.html, from the run directory alone
python jobs/report.py RUN_DIR --pick latency=0.8     # which depth's bundle meets a budget
python jobs/report.py RUN_DIR --replay tious=0.7     # would another metric have dropped other blocks?
"""

from __future__ import annotations

import argparse
import sys

from pbd_ray.cluster.monitoring import exit_status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="local path, s3:// or gs:// URI")
    parser.add_argument(
        "--detad", metavar="RULES", help="thumos14, activitynet or a YAML file; default: by the recipe"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="where the page is written; default: report.html in RUN_DIR"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--pick", metavar="LIMIT", nargs="+", help="latency=, macs=, params= (shares), map_loss=: at most"
    )
    instead.add_argument(
        "--replay", metavar="RULE", nargs="*", help="tious=0.3:0.7:0.1 and classes=NAME,NAME; default: as run"
    )
    arguments = parser.parse_args()
    if (arguments.pick or arguments.replay is not None) and (arguments.output or arguments.detad):
        parser.error("--output and --detad go with the page, not with --pick or --replay")
    return exit_status(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    from pbd_ray.cluster.reporting import make_report, print_pick, print_replay

    if arguments.pick:
        print_pick(arguments.run_dir, arguments.pick)
    elif arguments.replay is not None:
        print_replay(arguments.run_dir, arguments.replay)
    else:
        make_report(arguments.run_dir, arguments.detad, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
