"""`jobs/compress.py --plan`, and what becomes of the plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.cluster import planning
from pbd_ray.report.forecast import forecast_from_json
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.verify import verify


def test_a_plan_and_its_run(
    run_job: Callable[..., Any],
    tiny_recipe: str,
    video_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run is compared with what was planned before it began; a later plan is not kept."""
    run_dir = tmp_path / "run"
    place = (f"run_dir={run_dir}", f"cache_dir={video_cache}")
    arguments = (tiny_recipe, "backend=local", *place, "stopping.max_drops=1")
    planned = run_job("compress.py", *arguments, "--plan", "price_per_device_hour=3")
    assert planned.status == 0, planned.err
    assert f"{run_dir}/plan/plan.json: the run will be compared with it" in planned.out
    rows = re.findall(r"^(?:teacher| +\d) +(\w+) +\d+ s", planned.out, re.MULTILINE)
    assert rows == ["fit", "evaluation", "latency", "scores", "align", "evaluation", "latency"]
    assert re.search(r"^cost: .* at 3 a CPU hour$", planned.out, re.MULTILINE)
    assert [path.name for path in (run_dir / "plan").iterdir()] == ["plan.json"]

    ran = run_job("compress.py", *arguments)
    assert ran.status == 0, ran.err
    assert re.search(r"planned \d+ s \[\d+ s, \d+ s\] for these stages, they took \d+ s \(", ran.out)
    assert verify(str(run_dir)) == []
    stages = Ledger.existing(str(run_dir)).teacher.read_measured()["stages"]
    assert list(stages) == ["fit", "evaluation"]
    assert [run["epochs"] for run in stages["fit"]["learning_rates"].values()] == [2]
    assert "by the plan that was made before" in (run_dir / "report.html").read_text()

    kept = (run_dir / "plan" / "plan.json").read_bytes()
    other = replace(forecast_from_json(json.loads(kept)), disk_bytes=1)
    monkeypatch.setattr(planning, "_plan", lambda *given: other)  # measured above
    late = run_job("compress.py", *arguments, "--plan")
    assert late.status == 0, late.err
    assert f"{run_dir} holds a run that has begun: this plan is not kept" in late.out
    assert (run_dir / "plan" / "plan.json").read_bytes() == kept
