"""Is the next round still within the budget, `execution.max_device_hours`?"""

from __future__ import annotations

from collections.abc import Sequence

from pbd_ray.config import Execution
from pbd_ray.report.forecast import Forecast, device_hours
from pbd_ray.report.search_cost import held_seconds
from pbd_ray.search.state import RoundRecord


def budget_reason(records: Sequence[RoundRecord], execution: Execution, plan: Forecast | None) -> str | None:
    """One sentence on why no further round is begun, or None to go on.

    The next round is expected to take what the last one did, or what was planned for it if that is more; the
    first, without a plan, nothing.

    Args:
        records: all committed rounds, the teacher first.
    """
    most = execution.max_device_hours
    if most is None:
        return None
    spent = [spent_hours(record, execution.device) for record in records]
    last = spent[-1] if len(records) > 1 else 0.0
    following = max(last, 0.0 if plan is None else device_hours(plan, execution, len(records)))
    if sum(spent) + following <= most:
        return None
    kind = "GPU" if execution.device == "cuda" else "CPU"
    return (
        f"{sum(spent):.3g} {kind} hours are spent and the next round may take {following:.3g}, "
        f"execution.max_device_hours {most:g}"
    )


def spent_hours(record: RoundRecord, device: str) -> float:
    """Hours of GPUs that a round held, of CPUs where `device` is cpu. Of a stage that was interrupted only
    the last part is known."""
    kind = 1 if device == "cuda" else 0
    stages = record.measured.get("stages", {}).items()
    return sum(held_seconds(name, facts)[kind] for name, facts in stages) / 3600
