"""Data-parallel fine-tuning in real gloo processes: one worker or two, one global batch, the same run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RANK = Path(__file__).with_name("ddp_rank.py")
PLAIN: dict[str, Any] = {}
SPLIT = {"accumulation_steps": 2, "activation_checkpointing": True}
CASES = [("float64", PLAIN), ("float64", SPLIT), ("float32", PLAIN)]
TOLERANCES = {"float64": 1e-6, "float32": 1e-4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict[str, Any]]]]:
    """By number of workers: what every rank says of every case."""
    folder = tmp_path_factory.mktemp("ddp")
    with contextlib.ExitStack() as stack:
        ranks = {
            size: [stack.enter_context(_rank(rank, size, folder)) for rank in range(size)] for size in (1, 2)
        }
        return {size: [json.loads(rank.communicate()[0]) for rank in each] for size, each in ranks.items()}


@contextlib.contextmanager
def _rank(rank: int, size: int, folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(RANK), str(rank), str(size), f"file://{folder / str(size)}", json.dumps(CASES)],
        env={**os.environ, "PYTHONPATH": str(RANK.parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()  # of no effect on one that has ended


@pytest.mark.parametrize("case", range(len(CASES)), ids=["float64", "float64 in parts", "float32"])
def test_one_worker_and_two(runs: dict[int, list[list[dict[str, Any]]]], case: int) -> None:
    """Every loss term of ten steps and the EMA; in parts: gradient accumulation, activations computed anew.

    Counts that the terms are divided by, and the loss normaliser they move, are those of the global batch:
    the same to the last bit."""
    tolerance = TOLERANCES[CASES[case][0]]
    alone = runs[1][0][0 if CASES[case][0] == "float64" else case]
    for rank in (0, 1):
        shared = runs[2][rank][case]
        assert shared["counts"] == alone["counts"] and shared["normalizer"] == alone["normalizer"]
        for ours, theirs in zip(shared["losses"], alone["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance, abs=0)
        # Nothing depends on the biases of attention's keys: rounding is all that moves them.
        assert shared["ema"] == pytest.approx(alone["ema"], rel=tolerance, abs=1e-9)


def test_the_ranks_agree(runs: dict[int, list[list[dict[str, Any]]]]) -> None:
    assert runs[2][0] == runs[2][1]


def test_the_run_is_one_worth_comparing(runs: dict[int, list[list[dict[str, Any]]]]) -> None:
    """Weights move, every term counts, and the counts are of unequal windows."""
    alone = runs[1][0][0]
    first, last = alone["losses"][0], alone["losses"][-1]
    assert abs(last["total"] / first["total"] - 1) > 0.1 and all(value > 0 for value in last.values())
    assert len({count["positives"] for count in alone["counts"]}) > 5
    assert {count["windows"] for count in alone["counts"]} == {4}
