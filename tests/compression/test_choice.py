"""From scores to the block that goes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pbd_ray.compression.blocks import UNDROPPED
from pbd_ray.compression.candidates import CandidateScore
from pbd_ray.compression.choice import choose_block, finalists, tied_on_map
from pbd_ray.config import ScoringConfig


def scores(*given: tuple[int, float, float | None, float | None]) -> list[CandidateScore]:
    """(block, score, average mAP, train loss), and an undropped student that would win everything."""
    undropped = [CandidateScore(UNDROPPED, 1.0, 1.0, 0.0, 2)]
    return undropped + [CandidateScore(block, s, a, loss, 2) for block, s, a, loss in given]


AVERAGE, LOSS, INDEX = "average mAP decided", "train loss decided", "lower index decided"
MAP_CASES = [
    ("the highest wins", [(0, 0.3, 0.1, None), (1, 0.5, 0.1, None), (2, 0.4, 0.9, None)], 1, None),
    ("one candidate", [(7, 0.0, 0.0, None)], 7, None),
    ("average mAP", [(0, 0.9, 0.5, None), (4, 0.9, 0.6, None), (5, 0.8, 0.7, None)], 4,
     f"blocks 0, 4 score 0.9 alike; {AVERAGE}"),
    ("train loss", [(0, 0.9, 0.6, 2.0), (3, 0.9, 0.6, 1.0), (4, 0.9, 0.6, 3.0)], 3,
     f"blocks 0, 3, 4 score 0.9 alike; {LOSS}"),
    ("average mAP comes before train loss", [(0, 0.9, 0.5, 0.1), (3, 0.9, 0.6, 9.0)], 3,
     f"blocks 0, 3 score 0.9 alike; {AVERAGE}"),
    ("average mAP, then train loss", [(0, 0.9, 0.5, None), (3, 0.9, 0.6, 2.0), (4, 0.9, 0.6, 1.0)], 4,
     f"blocks 0, 3, 4 score 0.9 alike; {LOSS}"),
    ("nothing but the index", [(5, 0.9, 0.6, 1.0), (3, 0.9, 0.6, 1.0)], 3,
     f"blocks 5, 3 score 0.9 alike; {INDEX}"),
    ("no loss measured", [(2, 1.0, 1.0, None), (6, 1.0, 1.0, None)], 2,
     f"blocks 2, 6 score 1 alike; {INDEX}"),
    ("all zero", [(1, 0.0, 0.0, None), (4, 0.0, 0.0, None), (8, 0.0, 0.0, None)], 1,
     f"blocks 1, 4, 8 score 0 alike; {INDEX}"),
    ("a measured loss beats none", [(1, 0.5, 0.5, None), (4, 0.5, 0.5, 7.0)], 4,
     f"blocks 1, 4 score 0.5 alike; {LOSS}"),
]  # fmt: skip
VALUE_CASES = [
    ("the lowest wins", [(0, 0.3, None, None), (1, 0.2, None, None), (2, 0.4, None, None)], 1, None),
    ("the lower index", [(6, 0.2, None, 0.2), (2, 0.2, None, 0.2), (1, 0.4, None, 0.4)], 2,
     f"blocks 6, 2 score 0.2 alike; {INDEX}"),
]  # fmt: skip
CASES = [("map", *case) for case in MAP_CASES]
CASES += [(criterion, *case) for criterion in ("train_loss", "mse") for case in VALUE_CASES]


@pytest.mark.parametrize(
    ("criterion", "given", "block", "tie"),
    [pytest.param(c, given, block, tie, id=f"{c}: {name}") for c, name, given, block, tie in CASES],
)
def test_choice(criterion: Any, given: list[Any], block: int, tie: str | None) -> None:
    choice = choose_block(scores(*given), ScoringConfig(criterion=criterion))
    assert (choice.block, choice.tie) == (block, tie)


@pytest.mark.parametrize(
    ("criterion", "given", "expected"),
    [
        ("map", [(0, 0.9, 0.5, None), (3, 0.8, 0.5, None)], ()),
        ("map", [(0, 0.9, 0.5, None), (3, 0.9, 0.6, None)], ()),
        ("map", [(0, 0.9, 0.6, None), (3, 0.9, 0.6, None), (4, 0.9, 0.5, None)], (0, 3)),
        ("map", [(0, 0.2, 0.2, None), (3, 0.2, 0.2, None), (4, 0.9, 0.5, None)], ()),
        ("map", [(5, 0.0, 0.0, None), (3, 0.0, 0.0, None)], (5, 3)),
        ("train_loss", [(0, 0.9, None, 0.9), (3, 0.9, None, 0.9)], ()),
        ("mse", [(0, 0.9, None, None), (3, 0.9, None, None)], ()),
    ],
)
def test_who_needs_a_train_loss(criterion: Any, given: list[Any], expected: tuple[int, ...]) -> None:
    assert tied_on_map(scores(*given), ScoringConfig(criterion=criterion)) == expected


@pytest.mark.parametrize("order", [(0, 3), (3, 0)])
def test_a_loss_that_is_not_a_number_never_wins(order: tuple[int, int]) -> None:
    """Half precision may overflow in one subnet."""
    losses = {0: math.nan, 3: 1.0}
    given = scores(*((block, 0.9, 0.5, losses[block]) for block in order))
    assert choose_block(given, ScoringConfig()).block == 3
    given = scores(*((block, losses[block], None, losses[block]) for block in order))
    assert choose_block(given, ScoringConfig(criterion="train_loss")).block == 3


def test_those_that_racing_stopped_are_not_chosen() -> None:
    """Whatever score they had reached; nor are they ties."""
    given = [
        CandidateScore(3, 0.95, 0.9, None, 20, stopped=True),
        CandidateScore(1, 0.90, 0.5, None, 40),
        CandidateScore(2, 0.89, 0.5, None, 40),
        CandidateScore(5, 0.80, 0.5, None, 40),
    ]
    choice = choose_block(given, ScoringConfig(delta=0.02))
    assert (choice.block, choice.near, choice.tie) == (1, (2,), None)
    even = [CandidateScore(1, 0.95, 0.9, None, 40), CandidateScore(2, 0.95, 0.9, None, 40), given[0]]
    assert tied_on_map(even, ScoringConfig()) == (1, 2)


@pytest.mark.parametrize(
    ("delta", "criterion", "near"),
    [(0.0, "map", (6,)), (0.11, "map", (2, 6)), (1.0, "map", (2, 4, 6)), (0.11, "train_loss", (2, 6))],
)
def test_near_ties(delta: float, criterion: Any, near: tuple[int, ...]) -> None:
    sign = 1 if criterion == "map" else -1
    values = {4: 0.2, 6: 0.5, 2: 0.4, 0: 0.5}
    given = [CandidateScore(block, sign * value, None, None, 2) for block, value in values.items()]
    choice = choose_block(given, ScoringConfig(criterion=criterion, delta=delta))
    assert (choice.block, choice.near) == (0, near)


@pytest.mark.parametrize(
    ("without", "chosen", "near"),
    [((), 1, (2,)), ((1,), 2, (4,)), ((2, 1), 4, ()), ((4, 2, 1), 0, ()), ((2,), 1, ())],
)
def test_the_next_best(without: tuple[int, ...], chosen: int, near: tuple[int, ...]) -> None:
    """Candidates that were tried neither are chosen nor count as ties; what racing stopped stays out."""
    values = {-1: 0.99, 0: 0.5, 1: 0.9, 2: 0.885, 4: 0.87}
    given = [CandidateScore(block, value, None, None, 9) for block, value in values.items()]
    given.append(CandidateScore(3, 0.95, None, None, 2, stopped=True))
    choice = choose_block(given, ScoringConfig(delta=0.02), without)
    assert (choice.block, choice.near) == (chosen, near)
    assert {score.block for score in finalists(given, without)} == {0, 1, 2, 4} - set(without)
