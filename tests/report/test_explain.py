"""Why a block went, from a summary as the run writes it."""

from __future__ import annotations

from typing import Any

import pytest

from pbd_ray.config import UserError
from pbd_ray.report.explain import OriginInfo, candidates_info, explain_text

TEACHER: dict[str, Any] = {
    "kept_blocks": [0, 1, 2, 3],
    "map": {"0.3": 0.8, "0.5": 0.6},
    "average_map": 0.7,
    "headline_map": 0.6,
    "macs": 4_000_000_000,
    "block_macs": 2_000_000_000,
    "params": 1_000_000,
    "latency_ms": 20.0,
    "seconds": {},
}


def candidate(score: float | None, behind: float | None = None, **changes: Any) -> dict[str, Any]:
    low, high = (None, None) if behind is None else (behind - 0.5, behind + 0.25)
    facts = {"score": score, "average_map": None, "train_loss": None, "videos": 8, "stopped": False}
    return facts | {"behind": behind, "behind_low": low, "behind_high": high} | changes


FIRST: dict[str, Any] = {
    **TEACHER,
    "round": 1,
    "standing": True,
    "rolled_back": None,
    "undecided": False,
    "guards": [],
    "dropped_block": 2,
    "criterion": "map",
    "undropped_score": 0.99,
    "candidates": {
        "0": candidate(0.5, 0.47, videos=3, stopped=True),
        "1": candidate(0.75, 0.125),
        "2": candidate(0.875),
        "3": candidate(0.8125, 0.0625),
    },
    "tie": None,
    "near": [3],
    "lr": 1e-4,
    "epoch": 7,
    "kept_blocks": [0, 1, 3],
    "map": {"0.3": 0.79, "0.5": 0.58},
    "average_map": 0.69,
    "macs": 3_000_000_000,
    "block_macs": 1_500_000_000,
    "params": 800_000,
    "latency_ms": 15.0,
    "seconds": {"scores": 12.34, "align": 99.0},
    "interval": {
        "difference": -0.02,
        "low": -0.05,
        "high": 0.01,
        "confidence": 0.95,
        "videos": 48,
        "unreliable": False,
        "margin": 0.03,
        "verdict": "undecided",
    },
    "selection_interval": None,
}
SECOND: dict[str, Any] = {
    **FIRST,
    "round": 2,
    "dropped_block": 1,
    "criterion": "train_loss",
    "candidates": {"0": candidate(None), "1": candidate(0.25), "3": candidate(0.25, 0.0)},
    "tie": "blocks 1, 3 score 0.25 alike; lower index decided",
    "near": [],
    "kept_blocks": [0, 3],
    "macs": 2_000_000_000,
    "lr": None,
    "epoch": 0,
    "interval": {**FIRST["interval"], "unreliable": True},
    "selection_interval": {**FIRST["interval"], "videos": 5, "verdict": "holds"},
}
# Round 2 is tried and rolled back; round 3 takes its runner-up from the model of round 1.
FAILED: dict[str, Any] = {
    **SECOND,
    "standing": False,
    "rolled_back": "inferior on selection videos: AP of jump -0.4, limit 0.1",
    "guards": [
        {
            "what": what,
            "name": name,
            "difference": value,
            "low": value - 0.0625,
            "high": value + 0.125,
            "limit": 0.1,
            "verdict": verdict,
            "left_out": 0,
        }
        for what, name, value, verdict in (
            ("class_loss", "jump", -0.4, "inferior"),
            ("false_negative_rise", "length XS", 0.05, "undecided"),
        )
    ],
}
THIRD: dict[str, Any] = {
    **SECOND,
    "round": 3,
    "dropped_block": 3,
    "undecided": True,
    "kept_blocks": [0, 1],
    "macs": 1_000_000_000,
}
TIED: dict[str, Any] = {
    **FIRST,
    "candidates": {
        "0": candidate(1.0, average_map=0.8, train_loss=0.5),
        "1": candidate(1.0, average_map=0.9, train_loss=0.5),
        "2": candidate(1.0, average_map=0.9, train_loss=0.3),
        "3": candidate(1.0, average_map=0.9, train_loss=0.4),
    },
}
"""Of equal mAP: average mAP, then the training loss."""
GIVEN: dict[str, Any] = {**FIRST, "criterion": "given", "candidates": {}, "undropped_score": None, "near": []}


def summary(*rounds: dict[str, Any]) -> dict[str, Any]:
    return {"teacher": TEACHER, "rounds": list(rounds), "stop_reason": None, "bit_exact": True}


@pytest.mark.parametrize(
    ("entry", "order"),
    [
        (FIRST, [2, 3, 1, 0]),  # mAP: high first; what racing stopped comes last, whatever its score
        (SECOND, [1, 3, 0]),  # losses: low first; one that is not finite comes last
        ({**SECOND, "dropped_block": 3}, [3, 1, 0]),  # of equals the one that went
        (TIED, [2, 3, 1, 0]),
        (GIVEN, []),
    ],
)
def test_best_first(entry: dict[str, Any], order: list[int]) -> None:
    assert [candidate.block for candidate in candidates_info(entry, OriginInfo(TEACHER, {}))] == order


@pytest.mark.parametrize(
    ("round", "line"),
    [
        (1, "round 1: block 2 went, 0, 1, 3 stay"),
        (1, "stands"),
        (1, "criterion map: mAP of the student without the block on the scoring videos, higher is better"),
        (1, "2 0.875 - 8 went"),
        (1, "3 0.8125 0.0625 [-0.4375, 0.3125] 8"),
        (1, "0 0.5 0.47 [-0.03, 0.72] 3 stopped by racing"),
        (1, "the student before, nothing removed: 0.99"),
        (1, "tie: none"),
        (1, "within scoring.delta of the one that went: 3"),
        (1, "runner-up: block 3, score 0.8125, behind 0.0625 [-0.4375, 0.3125]"),
        (1, "learning rate chosen: 0.0001, epoch 7"),
        (1, "mAP@0.5 0.6000 0.6000 0.5800"),
        (1, "average mAP 0.7000 0.7000 0.6900"),
        (1, "G MACs 4 4 3 75.0%"),
        (1, "M parameters 1 1 0.8 80.0%"),
        (1, "ms a window 20 20 15 75.0%"),
        (
            1,
            "headline mAP less the teacher's on test videos: -0.0200 [-0.0500, +0.0100] (95%, 48 videos): "
            "undecided with margin 0.03",
        ),
        (1, "seconds: scores 12.3, align 99.0"),
        (2, "0 - - 8"),
        (2, "tie: blocks 1, 3 score 0.25 alike; lower index decided"),
        (2, "runner-up: block 3, score 0.25, behind 0 [-0.5, 0.25]"),
        (2, "learning rate chosen: nothing was trained"),
        (2, "G MACs 4 3 2 50.0%"),  # before is round 1
        (
            2,
            "headline mAP less the teacher's on selection videos: -0.0200 [-0.0500, +0.0100] "
            "(95%, 5 videos): holds with margin 0.03",
        ),
    ],
)
def test_says(round: int, line: str) -> None:
    text = explain_text(summary(FIRST, SECOND), round)
    assert line in [" ".join(shown.split()) for shown in text.splitlines()]


@pytest.mark.parametrize(
    ("round", "line"),
    [
        (2, "rolled back: inferior on selection videos: AP of jump -0.4, limit 0.1"),
        (2, "AP of jump -0.4000 [-0.4625, -0.2750] 0.1 inferior"),
        (2, "share missed of length XS +0.0500 [-0.0125, +0.1750] 0.1 undecided"),
        (3, "stands, undecided on selection videos"),
        (3, "3 0.25 0 [-0.5, 0.25] 8 went"),
        (3, "1 0.25 - 8 rolled back in round 2"),
        (3, "chosen without 1; behind is counted from 1, the first choice"),
        (3, "runner-up: block 0, score -, behind -"),
        (3, "G MACs 4 3 1 25.0%"),  # before is round 1, not 2
    ],
)
def test_says_of_a_roll_back(round: int, line: str) -> None:
    text = explain_text(summary(FIRST, FAILED, THIRD), round)
    assert line in [" ".join(shown.split()) for shown in text.splitlines()]


def test_too_few_videos_is_said() -> None:
    texts = [explain_text(summary(FIRST, SECOND), round) for round in (1, 2)]
    assert ["too few videos to rely on" in text for text in texts] == [False, True]


def test_a_given_block_has_no_candidates() -> None:
    text = explain_text(summary(GIVEN), 1)
    assert "the recipe names the block (scoring.drops)" in text
    assert "runner-up" not in text


def test_nothing_is_cut_short_or_torn_apart() -> None:
    text = explain_text(summary(FIRST), 1)
    assert "…" not in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("rounds", "round", "there"),
    [([FIRST, SECOND], 3, "1 to 2"), ([FIRST], 0, "1 to 1"), ([], 1, "none yet")],
)
def test_no_such_round(rounds: list[dict[str, Any]], round: int, there: str) -> None:
    with pytest.raises(UserError, match=f"round {round} is not among the committed rounds: {there}"):
        explain_text(summary(*rounds), round)
