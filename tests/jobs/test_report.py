"""jobs/report.py on a run, as a process of its own: what it writes, prints, and refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Ask = Callable[..., tuple[int, list[str]]]


def test_the_page_is_made_again(ask_run: Ask, run_dir: Path, tmp_path: Path) -> None:
    """Byte for byte but for the place it names; the run's videos, cache and teacher are not needed."""
    page = (run_dir / "report.html").read_text()
    (run_dir / "report.html").unlink()
    shutil.rmtree(run_dir / "rounds/01/model")
    shutil.rmtree(run_dir / "rounds/01/scores")
    status, lines = ask_run("report.py", str(run_dir))
    assert status == 0
    assert lines[-1].endswith(f"{run_dir}/report.html")
    made = (run_dir / "report.html").read_text()
    assert made.count(str(run_dir)) == 1
    where = page.split("run directory</th><td>")[1].split("<")[0]
    assert page.replace(where, str(run_dir)) == made


def test_elsewhere_with_other_rules(ask_run: Ask, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    status, lines = ask_run("report.py", str(run_dir), "--output", str(output), "--detad", "activitynet")
    assert (status, lines[-1].endswith(str(output))) == (0, True)
    assert output.read_text() != (run_dir / "report.html").read_text()


def test_pick(ask_run: Ask, run_dir: Path) -> None:
    status, lines = ask_run("report.py", str(run_dir), "--pick", "macs=0.9")
    assert status == 0
    assert lines[0] == f"{run_dir}/rounds/01/model"
    assert lines[1].startswith("3 of 4 blocks, the fewest drops with macs at most 0.9: macs 0.8")
    status, lines = ask_run("report.py", str(run_dir), "--pick", "macs=1")
    assert (status, lines[0]) == (0, f"{run_dir}/teacher")


def test_replay(ask_run: Ask, run_dir: Path) -> None:
    status, lines = ask_run("report.py", str(run_dir), "--replay", "tious=0.1,0.2", "classes=rise")
    assert status == 0
    assert lines[0].startswith("round 1: block ")
    assert [line.split()[0] for line in lines if line.strip().startswith(("mAP@", "average"))] == [
        "mAP@0.1",
        "mAP@0.2",
        "average",
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere"], "error: nowhere/recipe.yaml is missing: not a run directory"),
        (["RUN", "--pick", "speed=1"], "error: --pick speed=1: 'speed' is not one of"),
        (
            ["RUN", "--pick", "macs=0.1"],
            "error: --pick: no depth has macs at most 0.1: 3 blocks have macs 0.8",
        ),
        (["RUN", "--replay", "metric=f1"], "error: --replay metric=f1: expected tious="),
        (["RUN", "--replay", "tious=2"], "error: --replay tious '2': expected distinct thresholds in (0, 1]"),
        (
            ["RUN", "--replay", "classes=dance"],
            "error: --replay classes: 'dance' is none of the run's 4 classes",
        ),
        (["RUN", "--detad", "mine"], "error: DETAD rules 'mine' are neither a file nor one of"),
        (["RUN", "--output", "/nowhere/page.html"], "error: --output /nowhere/page.html: cannot be written"),
    ],
)
def test_refused(ask_run: Ask, run_dir: Path, arguments: list[str], problem: str) -> None:
    status, lines = ask_run("report.py", *(str(run_dir) if one == "RUN" else one for one in arguments))
    assert status == 2
    assert len(lines) == 1
    assert (
        problem.replace("nowhere/recipe", f"{Path.cwd()}/nowhere/recipe") in lines[0] or problem in lines[0]
    )
