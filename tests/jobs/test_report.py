"""jobs/report.py on a run: what it writes, prints, and refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Run = Callable[..., Any]


def test_the_page_is_made_again(run_job: Run, run_dir: Path) -> None:
    """Byte for byte but for the place it names; the run's videos, cache and teacher are not needed."""
    page = (run_dir / "report.html").read_text()
    (run_dir / "report.html").unlink()
    shutil.rmtree(run_dir / "rounds/01/model")
    shutil.rmtree(run_dir / "rounds/01/scores")
    found = run_job("report.py", str(run_dir))
    assert found.status == 0
    assert found.out.endswith(f"{run_dir}/report.html\n")
    made = (run_dir / "report.html").read_text()
    place = "run directory</th><td>"
    before = page.split(place)[1].split("<")[0]
    assert before != str(run_dir)
    assert page.replace(f"{place}{before}<", f"{place}{run_dir}<") == made


def test_elsewhere_with_other_rules(run_job: Run, run_dir: Path, tmp_path: Path) -> None:
    """The same run, to the same kind of place: only the rules tell the pages apart."""
    pages = []
    for option in ([], ["--detad", "activitynet"]):
        output = tmp_path / f"page-{len(pages)}.html"
        found = run_job("report.py", str(run_dir), "--output", str(output), *option)
        assert (found.status, found.out.endswith(f"{output}\n")) == (0, True)
        pages.append(output.read_text())
    assert pages[0] != pages[1]


def test_pick(run_job: Run, run_dir: Path) -> None:
    found = run_job("report.py", str(run_dir), "--pick", "macs=0.9")
    assert (found.status, found.out) == (0, f"{run_dir}/rounds/01/model\n")
    assert found.err.startswith("3 of 4 blocks, the fewest drops with macs at most 0.9: macs 0.8")
    found = run_job("report.py", str(run_dir), "--pick", "macs=1")
    assert (found.status, found.out) == (0, f"{run_dir}/teacher\n")


def test_replay(run_job: Run, run_dir: Path) -> None:
    found = run_job("report.py", str(run_dir), "--replay", "tious=0.1,0.2", "classes=rise")
    assert found.status == 0
    lines = found.out.splitlines()
    assert lines[0].startswith("round 1: block ")
    assert [line.split()[0] for line in lines if line.strip().startswith(("mAP@", "average"))] == [
        "mAP@0.1",
        "mAP@0.2",
        "average",
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["/nowhere"], "/nowhere/recipe.yaml is missing: not a run directory"),
        (["RUN", "--pick", "speed=1"], "--pick speed=1: 'speed' is not one of"),
        (["RUN", "--pick", "macs=0.1"], "--pick: no depth has macs at most 0.1: 3 blocks have macs 0.8"),
        (["RUN", "--replay", "metric=f1"], "--replay metric=f1: expected tious="),
        (["RUN", "--replay", "tious=2"], "--replay tious '2': expected distinct thresholds in (0, 1]"),
        (["RUN", "--replay", "classes=dance"], "--replay classes: 'dance' is none of the run's 4 classes"),
        (["RUN", "--detad", "mine"], "DETAD rules 'mine' are neither a file nor one of"),
        (["RUN", "--output", "/nowhere/page.html"], "--output /nowhere/page.html: cannot be written"),
    ],
)
def test_refused(run_job: Run, run_dir: Path, arguments: list[str], problem: str) -> None:
    found = run_job("report.py", *(str(run_dir) if one == "RUN" else one for one in arguments))
    assert found.status == 2
    assert found.err.startswith(f"error: {problem}")
    assert found.err.count("\n") == 1
