"""Which rounds stand, from their evidence alone."""

from __future__ import annotations

from typing import Any

import pytest

from pbd_ray.search.standing import doubt, rolled_back, standing, tried
from pbd_ray.search.state import Decision, Evaluation, Guard, Interval, RoundRecord


def interval(verdict: Any, unreliable: bool = False) -> Interval:
    return Interval(-0.02, -0.05, -0.011, 0.95, 12, unreliable, 0, 0.01, verdict)


def guard(name: str, verdict: Any, what: Any = "class_loss", unreliable: bool = False) -> Guard:
    return Guard(what, name, 0.25, 0.125, 0.5, 0.1, verdict, 12, unreliable, 0)


def evaluation(interval: Interval | None = None, *guards: Guard) -> Evaluation:
    return Evaluation((0, 1), {0.5: 0.5}, 0.5, 0.5, 1, 1, 1, None, interval, guards)


LEAD = "on selection videos: "
MAP = "mAP less the teacher's -0.0200 [-0.0500, -0.0110], tolerance 0.01"


@pytest.mark.parametrize(
    ("found", "reason", "open_question"),
    [
        (evaluation(), None, None),
        (evaluation(interval("holds"), guard("jump", "holds")), None, None),
        (evaluation(interval("inferior")), f"inferior {LEAD}{MAP}", None),
        (evaluation(interval("inferior", True)), f"inferior {LEAD}{MAP}, only 12 videos", None),
        (evaluation(interval("undecided")), None, f"undecided {LEAD}{MAP}"),
        (
            evaluation(interval("undecided"), guard("jump", "inferior")),
            f"inferior {LEAD}AP of jump +0.2500 [+0.1250, +0.5000], limit 0.1",
            None,
        ),
        (
            evaluation(None, guard("jump", "inferior", unreliable=True)),
            f"inferior {LEAD}AP of jump +0.2500 [+0.1250, +0.5000], limit 0.1, only 12 videos",
            None,
        ),
        (
            evaluation(None, guard("length XS", "undecided", "false_negative_rise"), guard("run", "holds")),
            None,
            f"undecided {LEAD}share missed of length XS +0.2500 [+0.1250, +0.5000], limit 0.1",
        ),
        (
            evaluation(interval("inferior"), *(guard(name, "inferior") for name in "abcd")),
            f"inferior {LEAD}{MAP}; AP of a +0.2500 [+0.1250, +0.5000], limit 0.1; "
            "AP of b +0.2500 [+0.1250, +0.5000], limit 0.1; and 2 more",
            None,
        ),
    ],
)
def test_sentences(found: Evaluation, reason: str | None, open_question: str | None) -> None:
    assert (rolled_back(found), doubt(found)) == (reason, open_question)


@pytest.mark.parametrize(
    ("verdicts", "stand", "blocks"),
    [
        ([], [0], []),
        (["holds", "undecided"], [0, 1, 2], []),
        (["inferior"], [0], [1]),
        (["holds", "inferior", "inferior"], [0, 1], [2, 3]),
        (["inferior", "undecided", "inferior"], [0, 2], [3]),
        (["inferior", "inferior", "holds"], [0, 3], []),
    ],
)
def test_a_chain(verdicts: list[str], stand: list[int], blocks: list[int]) -> None:
    """Round n drops block n here."""
    records = [RoundRecord(0, "", "", evaluation())]
    for round, verdict in enumerate(verdicts, 1):
        decision = Decision(round, "map", round, (), (), None)
        records.append(RoundRecord(round, "", "", evaluation(interval(verdict)), decision))
    assert [record.round for record in standing(records)] == stand
    assert [decision.dropped_block for decision in tried(records)] == blocks
