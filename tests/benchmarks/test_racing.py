"""Replayed races choose what the run chose; a run without the rows for it is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import racing
from pbd_ray.cluster.run import run_compression
from pbd_ray.config import load_recipe


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """replay(RUN, ...) -> exit status of the benchmark."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["racing.py", *arguments])
        return racing.main()

    return run


@pytest.mark.slow
def test_races(
    replay: Callable[..., int],
    untrained_teacher: Path,
    tmp_path: Path,
    tiny_recipe: str,
    video_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a detector that detects nothing of use: all is near."""
    run, output = tmp_path / "run", tmp_path / "out.json"
    quick = [
        f"teacher.source={untrained_teacher}",
        "scoring.delta=1",
        "alignment.trainable=none",
        "stopping.max_drops=1",
        "data.synthetic.fit_videos=24",
    ]
    changes = [f"run_dir={run}", f"cache_dir={video_cache}", "backend=local", "scoring.racing=off", *quick]
    summary = run_compression(load_recipe(tiny_recipe, changes))
    assert replay(str(run), "--seeds", "2", "--json", str(output)) == 0
    races = json.loads(output.read_text())
    assert [(race["round"], race["seed"]) for race in races] == [(1, 0), (1, 1)]
    dropped = summary.rounds[0].decision.dropped_block
    assert all(race["exhaustive"] == dropped for race in races)
    assert all(0 < race["forward_share"] <= 1 and race["of_videos"] == 24 for race in races)
    told = capsys.readouterr().out
    assert "2 of 2 races" in told or "2 one within delta" in told


def test_a_folder_that_is_no_run(
    replay: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay(str(tmp_path)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ") and told.err.count("\n") == 1
