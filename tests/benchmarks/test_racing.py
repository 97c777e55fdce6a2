"""Replayed races choose what the run chose; a run without the rows for it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pbd_ray.cluster.run import run_compression
from pbd_ray.config import load_recipe

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "racing.py"


def replay(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_races(tmp_path: Path, tiny_recipe: str, video_cache: Path) -> None:
    """On a detector that detects nothing of use: all is near."""
    run, output = tmp_path / "run", tmp_path / "out.json"
    quick = [
        "scoring.delta=1",
        "alignment.trainable=none",
        "stopping.max_drops=1",
        "data.synthetic.fit_videos=24",
    ]
    changes = [f"run_dir={run}", f"cache_dir={video_cache}", "backend=local", "scoring.racing=off", *quick]
    summary = run_compression(load_recipe(tiny_recipe, changes))
    done = replay(str(run), "--seeds", "2", "--json", str(output))
    assert done.returncode == 0, done.stderr
    races = json.loads(output.read_text())
    assert [(race["round"], race["seed"]) for race in races] == [(1, 0), (1, 1)]
    dropped = summary.rounds[0].decision.dropped_block
    assert all(race["exhaustive"] == dropped for race in races)
    assert all(0 < race["forward_share"] <= 1 and race["of_videos"] == 24 for race in races)
    assert "2 of 2 races" in done.stdout or "2 one within delta" in done.stdout


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    done = replay(str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
