from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pbd_ray.config import Execution
from pbd_ray.report.forecast import StageForecast
from pbd_ray.search.budget import budget_reason
from pbd_ray.search.ledger import Ledger, LedgerError
from pbd_ray.search.state import RoundRecord

HOUR = 3600.0


def record(round: int, cpus: float = 1.0, gpus: float = 0.0, **stages: float) -> RoundRecord:
    """A round whose scoring pool has two workers that held `cpus` and `gpus` each; stage -> hours."""
    held = {"cpus_per_worker": cpus, "gpus_per_worker": gpus, "train_workers": 1}
    measured = {
        name: {"seconds": hours * HOUR, "resumed": False, "workers": 2, **held}
        for name, hours in stages.items()
    }
    evaluation: Any = None
    return RoundRecord(round, "", "", evaluation, measured={"stages": measured})


TEACHER, FIRST = record(0, evaluation=0.5), record(1, scores=1.0, evaluation=0.5)  # 1 and 3 CPU hours


@pytest.mark.parametrize(
    ("records", "most", "expected"),
    [
        ([TEACHER, FIRST], None, None),
        ([TEACHER, FIRST], 7.0, None),
        (
            [TEACHER, FIRST],
            6.9,
            "4 CPU hours are spent and the next round may take 3, execution.max_device_hours 6.9",
        ),
        ([TEACHER], 1.0, None),  # nobody knows what the first round takes
        (
            [TEACHER],
            0.9,
            "1 CPU hours are spent and the next round may take 0, execution.max_device_hours 0.9",
        ),
    ],
)
def test_reason(records: list[RoundRecord], most: float | None, expected: str | None) -> None:
    assert budget_reason(records, Execution(max_device_hours=most), None) == expected


def test_on_gpus_their_hours_count() -> None:
    """Half a GPU a worker, as the stages held them; CPUs are not counted, nor are rounds without GPUs."""
    execution = Execution(device="cuda", gpus_per_worker=1, cpus_per_worker=8, max_device_hours=3.4)
    later = [record(2, 8, 0.5, evaluation=0.5), record(3, 8, 0.5, scores=1.0, evaluation=0.5)]
    assert budget_reason([TEACHER, FIRST, *later], execution, None) == (
        "2 GPU hours are spent and the next round may take 1.5, execution.max_device_hours 3.4"
    )


def test_what_was_planned_for_the_next_round_counts() -> None:
    """One-shot alignment: all of it comes in the last round."""
    stage = StageForecast(2, "align", 0, 0, 0, cpu_hours=20.0, gpu_hours=0.0)
    plan: Any = SimpleNamespace(stages=(stage,))
    execution = Execution(max_device_hours=23.9)
    assert budget_reason([TEACHER, FIRST], execution, None) is None
    assert budget_reason([TEACHER, FIRST], execution, plan) == (
        "4 CPU hours are spent and the next round may take 20, execution.max_device_hours 23.9"
    )


def test_a_run_stops_between_rounds_and_goes_on(tmp_path: Path, make_world) -> None:
    broke = make_world({"execution__max_device_hours": 1e-12}).run(str(tmp_path / "run"))
    assert broke.rounds == ()
    assert "execution.max_device_hours 1e-12" in str(broke.stop_reason)
    rich = make_world({"execution__max_device_hours": 1e3}).run(str(tmp_path / "run"))
    whole = make_world().run(str(tmp_path / "other"))
    assert [record.result for record in rich.rounds] == [record.result for record in whole.rounds]
    assert rich.stop_reason == whole.stop_reason == "dropped 2 of at most 2 blocks"


def test_a_plan_is_not_a_plan(tmp_path: Path, make_recipe) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text('{"units": {}}')
    recipe = make_recipe()
    ledger = Ledger.open(str(tmp_path), recipe)  # a directory with nothing but a plan is a new run's
    with pytest.raises(
        LedgerError, match=r"plan/plan\.json: not a plan of this version: 'experiment'; delete"
    ):
        ledger.plan(recipe)
