from __future__ import annotations

from typing import Any

import pytest

from pbd_ray.config import StoppingConfig
from pbd_ray.search.state import Interval
from pbd_ray.search.stopping import Standing, stop_reason


def recovery(low: float, verdict: Any) -> Interval:
    return Interval(low + 0.01, low, low + 0.02, 0.95, 30, False, 0.02, verdict)


@pytest.mark.parametrize(
    ("standing", "rules", "max_drops", "expected"),
    [
        ({"drops": 0, "kept": 12}, {}, 3, None),
        ({"drops": 2, "kept": 10}, {}, 3, None),
        ({"drops": 3, "kept": 9}, {}, 3, "dropped 3 of at most 3 blocks"),
        ({"drops": 0, "kept": 12}, {}, 0, "dropped 0 of at most 0 blocks"),
        ({"drops": 1, "kept": 1}, {}, 3, "one block is left"),
        ({"drops": 1, "kept": 8, "macs_ratio": 0.7501}, {"target_macs_ratio": 0.75}, 9, None),
        (
            {"drops": 1, "kept": 8, "macs_ratio": 0.75},
            {"target_macs_ratio": 0.75},
            9,
            "MACs are 0.7500 of the teacher's, target 0.75",
        ),
        ({"drops": 1, "kept": 8, "latency_ratio": 0.81}, {"target_latency_ratio": 0.8}, 9, None),
        (
            {"drops": 1, "kept": 8, "latency_ratio": 0.79},
            {"target_latency_ratio": 0.8},
            9,
            "latency is 0.7900 of the teacher's, target 0.8",
        ),
        ({"drops": 0, "kept": 9}, {"tolerance": 0.02}, 9, None),
        ({"drops": 1, "kept": 8, "recovery": recovery(-0.01, "holds")}, {"tolerance": 0.02}, 9, None),
        (
            {"drops": 1, "kept": 8, "recovery": recovery(-0.03, "undecided")},
            {"tolerance": 0.02},
            9,
            "selection mAP may be 0.0300 below the teacher's (difference -0.0200), tolerance 0.02: "
            "the student no longer recovers",
        ),
        ({"drops": 1, "kept": 8, "recovery": recovery(-0.05, "inferior")}, {}, 9, None),
        (
            {"drops": 3, "kept": 8, "macs_ratio": 0.5, "recovery": recovery(-0.05, "inferior")},
            {"tolerance": 0.02, "target_macs_ratio": 0.9},
            3,
            "dropped 3 of at most 3 blocks",
        ),
    ],
)
def test_stop_reason(
    standing: dict[str, Any], rules: dict[str, Any], max_drops: int, expected: str | None
) -> None:
    assert stop_reason(Standing(**standing), StoppingConfig(**rules), max_drops) == expected
