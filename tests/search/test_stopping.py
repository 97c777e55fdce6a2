from __future__ import annotations

from typing import Any

import pytest

from pbd_ray.config import StoppingConfig
from pbd_ray.search.stopping import Standing, most_rounds, stop_reason


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
        ({"drops": 1, "kept": 8, "rolled_back": (5,), "untried": 3}, {"tolerance": 0.02}, 9, None),
        (
            {"drops": 1, "kept": 8, "rolled_back": (5, 3), "untried": 2},
            {"tolerance": 0.02},
            9,
            "removal of block 5, then 3, each inferior on selection videos: the student no longer recovers "
            "(stopping.runner_ups 1)",
        ),
        ({"drops": 1, "kept": 8, "rolled_back": (5, 3), "untried": 2}, {"runner_ups": 2}, 9, None),
        (
            {"drops": 0, "kept": 9, "rolled_back": (5,), "untried": 3},
            {"runner_ups": 0},
            9,
            "removal of block 5, inferior on selection videos: the student no longer recovers "
            "(stopping.runner_ups 0)",
        ),
        (
            {"drops": 0, "kept": 9, "rolled_back": (5, 3, 1), "untried": 0},
            {"runner_ups": 9},
            9,
            "removal of block 5, then 3, then 1, each inferior on selection videos: the student no longer "
            "recovers (no other candidate is left)",
        ),
    ],
)
def test_stop_reason(
    standing: dict[str, Any], rules: dict[str, Any], max_drops: int, expected: str | None
) -> None:
    assert stop_reason(Standing(**standing), StoppingConfig(**rules), max_drops) == expected


@pytest.mark.parametrize(
    ("rules", "scoring", "rounds"),
    [
        ({}, {}, 3),  # nothing judges a round
        ({"tolerance": 0.0}, {}, 6),
        ({"tolerance": 0.1, "runner_ups": 0}, {}, 3),
        ({"guardrails": {"max_class_loss": 0.1}, "runner_ups": 2}, {}, 3 + 3 + 2),  # two blocks are left
        ({"guardrails": {"max_false_negative_rise": 0.1}}, {"drops": [3, 1, 0]}, 3),  # no runner-up
        ({"tolerance": 0.1, "max_drops": 0}, {}, 0),
    ],
)
def test_most_rounds(make_recipe, rules: dict[str, Any], scoring: dict[str, Any], rounds: int) -> None:
    changes = {"experiment__stopping": {"max_drops": 3} | rules, "experiment__scoring": scoring}
    assert most_rounds(make_recipe(**changes).experiment) == rounds
