"""An ablation on a real Ray: runs as Tune trials, with the results that they have in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.cluster.ablation import run_ablation
from pbd_ray.config import load_recipe
from pbd_ray.search.ablation import ablation_recipe
from pbd_ray.search.ablation_tables import plan_tables

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_runs_are_trials(
    start: Callable[[Sequence[str]], Any],
    untrained_teacher: Path,
    tiny_recipe: str,
    video_cache: Path,
    tmp_path: Path,
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    common = [
        f"cache_dir={video_cache}",
        f"experiment.teacher.source={untrained_teacher}",
        "experiment.stopping.max_drops=1",
        "alignment.learning_rates=[1.0e-3]",
        "execution.progress_seconds=0.1",
    ]
    base = ablation_recipe(load_recipe(tiny_recipe, [*common, f"run_dir={here}", "backend=local"]))
    run_ablation(base, plan_tables(base, ["A", "F4"], [2]))

    options = ["--output", str(there), "--tables", "A,F4", "--seeds", "2"]
    driver = start(["jobs/ablate.py", tiny_recipe, *common, *options])
    log = driver.wait()
    assert driver.process.returncode == 0, log
    driver.assert_nothing_left()
    assert _results(there) == _results(here)
    assert len(_results(there)) == 4  # teacher and one round, of two runs
    for name in ("A.csv", "F4.csv"):
        assert (there / "tables" / name).read_bytes() == (here / "tables" / name).read_bytes()
    assert "run 1 of 1, ours-seed2: done" in log
    assert "run 1 of 1, lora-only-seed2: done" in log
    assert "ours-seed2: round 1: drop block" in log
    assert "Table F4" in log
    assert not (there / "ray").exists()


def _results(output: Path) -> dict[str, str]:
    commits = output.rglob("commit.json")
    return {str(path.relative_to(output)): json.loads(path.read_text())["result"] for path in commits}
