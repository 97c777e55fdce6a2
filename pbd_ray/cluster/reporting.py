"""What `jobs/report.py` does: a run's page, and questions that its directory answers without a forward."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pbd_ray.cluster.monitoring import say
from pbd_ray.config import ConfigError, UserError, one_line
from pbd_ray.metrics.detad_rules import load_rules
from pbd_ray.report.detection_report import tious_of
from pbd_ray.report.page import REPORT, report_page
from pbd_ray.report.pick import limits_of, pick
from pbd_ray.report.rounds import depths_info, frontier
from pbd_ray.report.whatif import whatif_text
from pbd_ray.search.evidence import gather
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.replay import replay


def write_report(ledger: Ledger) -> None:
    """report.html in the run directory, anew. That it cannot be made must not end a run: it says so."""
    try:
        ledger.storage.write(REPORT, report_page(gather(ledger)).encode())
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        say(f"no {REPORT} ({reason}), and the run goes on; python jobs/report.py makes it later")


def make_report(run_dir: str, detad: str | None, output: str | None) -> None:
    """Write the report of a run, from its directory alone, and say where it is.

    Args:
        detad: DETAD's rules by name or file; None: by the recipe.
        output: a local file; None: report.html in the run directory.

    Raises:
        UserError: there is no run, it has no committed teacher, or the page cannot be written.
    """
    ledger = Ledger.existing(run_dir)
    content = report_page(gather(ledger), None if detad is None else load_rules(detad)).encode()
    if output is None:
        ledger.storage.write(REPORT, content)
        say(ledger.storage.uri(REPORT))
        return
    try:
        Path(output).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from None
    say(output)


def print_pick(run_dir: str, limits: Sequence[str]) -> None:
    """Name the bundle of the depth that meets the limits.

    Raises:
        UserError: a limit is none, no depth meets them, or there is no run.
    """
    wanted = limits_of(limits)
    ledger = Ledger.existing(run_dir)
    summary = ledger.storage.read_json("summary.json")
    if summary is None:
        raise UserError(f"{ledger.storage.uri('summary.json')} is missing: no round is committed yet")
    depths = frontier(depths_info(summary))
    found = pick(depths, wanted)
    folder = ledger.teacher if found.depth is depths[0] else ledger.round(int(found.depth.label))
    print(ledger.storage.uri(folder.bundle))
    print(f"{found.depth.blocks} of {depths[0].blocks} blocks, {found.reason}", file=sys.stderr)
    if "map_loss" in wanted:
        print(
            "map_loss is measured on the test videos: report the mAP of this pick on others", file=sys.stderr
        )


def print_replay(run_dir: str, rules: Sequence[str]) -> None:
    """What other metrics would have chosen in every round.

    Args:
        rules: `tious=0.3:0.7:0.1` (default: the recipe's) and `classes=a,b` (default: all).

    Raises:
        UserError: a rule is none, or there is no run.
    """
    ledger = Ledger.existing(run_dir)
    tious, classes = ledger.recipe().experiment.evaluation.tious, None
    for rule in rules:
        name, _, value = rule.partition("=")
        if name == "tious":
            tious = tious_of(value, "--replay tious")
        elif name == "classes" and value:
            classes = value.split(",")
        else:
            raise ConfigError(f"--replay {rule}: expected tious=START:STOP:STEP or classes=NAME,NAME")
    print(whatif_text(replay(ledger, tious, classes)))
