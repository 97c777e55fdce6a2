"""The benchmark runs, its results equal its loops' and the golden ones, and nothing got far slower."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "metrics.py"


@pytest.mark.slow
def test_metrics(tmp_path: Path) -> None:
    """The bounds are a third of what a busy machine gave: other work doubles CPU times, too."""
    output = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--json", str(output)]
    done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    assert set(document["golden_differences"]) == {"n1000", "n2000"}
    *suppressions, video, mean_ap = document["rows"]
    assert len(suppressions) == 4 and all(row["published_ratio"] > 0.3 for row in suppressions)
    assert video["loop_ratio"] > 20
    assert mean_ap["published_ratio"] > 50
    assert all(row["what"] in done.stdout for row in document["rows"])
