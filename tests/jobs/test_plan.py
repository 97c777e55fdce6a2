"""`jobs/compress.py --plan`, and what becomes of the plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pbd_ray.search.ledger import Ledger
from pbd_ray.search.verify import verify


def test_a_plan_and_its_run(
    run_job: Callable[..., object], tiny_recipe: str, video_cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = (tiny_recipe, "backend=local", f"run_dir={run_dir}", f"cache_dir={video_cache}")
    planned = run_job("compress.py", *arguments, "--plan", "price_per_device_hour=3")
    assert planned.status == 0, planned.err
    assert f"{run_dir}/plan/plan.json: the run will be compared with it" in planned.out
    rows = re.findall(r"^(?:teacher| +\d) +(\w+) +\d+ s", planned.out, re.MULTILINE)
    rounds = ["scores", "align", "evaluation", "latency"]
    assert rows == ["fit", "evaluation", "latency", *rounds, *rounds]
    assert re.search(r"^cost: .* at 3 a CPU hour$", planned.out, re.MULTILINE)
    assert [path.name for path in (run_dir / "plan").iterdir()] == ["plan.json"]

    ran = run_job("compress.py", *arguments, "stopping.max_drops=2")
    assert ran.status == 0, ran.err
    assert re.search(r"planned \d+ s \[\d+ s, \d+ s\] for these stages, they took \d+ s \(", ran.out)
    assert verify(str(run_dir)) == []
    stages = Ledger.existing(str(run_dir)).teacher.read_measured()["stages"]
    assert list(stages) == ["fit", "evaluation"]
    assert [run["epochs"] for run in stages["fit"]["learning_rates"].values()] == [2]
    assert "by the plan that was made before" in (run_dir / "report.html").read_text()


def test_a_plan_for_a_run_that_has_begun(
    run_job: Callable[..., object], tiny_recipe: str, video_cache: Path, run_dir: Path
) -> None:
    arguments = (tiny_recipe, "backend=local", f"run_dir={run_dir}", f"cache_dir={video_cache}")
    found = run_job("compress.py", *arguments, "stopping.max_drops=1", "--plan")
    assert found.status == 0, found.err
    assert f"{run_dir} holds a run that has begun: this plan is not kept" in found.out
    assert not (run_dir / "plan").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--plan",), "RECIPE is missing"),
        (("demo", "--plan", "--print-config"), "not allowed with argument"),
    ],
)
def test_usage(
    arguments: tuple[str, ...],
    expected: str,
    run_job: Callable[..., object],
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job("compress.py", *arguments)
    assert ended.value.code == 2
    assert expected in capfd.readouterr().err
