"""`--verify` and `--explain` on a run: what they print and their exit status."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

Ask = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def ask(run_job: Callable[..., Any]) -> Ask:
    """ask("--verify", ...) -> exit status and the lines printed."""

    def run(*arguments: str) -> tuple[int, list[str]]:
        done = run_job("compress.py", *arguments)
        return done.status, (done.out + done.err).splitlines()

    return run


WITHOUT_TORCH_AND_RAY = """import runpy, sys
sys.modules["torch"] = sys.modules["ray"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def process(*arguments: str) -> tuple[int, list[str]]:
    """The same of a process of its own, in which neither torch nor Ray can be imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH_AND_RAY, str(ROOT / "jobs" / "compress.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_a_healthy_run(run_dir: Path) -> None:
    """Copied and away from where it was made."""
    assert process("--verify", str(run_dir)) == (0, [f"{run_dir}: 1 rounds, all hashes hold"])


def flip_a_byte(run_dir: Path) -> str:
    path = run_dir / "rounds/01/model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "rounds/01/model/model.safetensors: bytes differ from the commit"


def truncate(run_dir: Path) -> str:
    path = run_dir / "rounds/01/scores.parquet"
    path.write_bytes(path.read_bytes()[:100])
    return "rounds/01/scores.parquet: bytes differ from the commit"


def truncate_and_hide(run_dir: Path) -> str:
    """The byte hash fits what is left."""
    truncate(run_dir)
    commit = run_dir / "rounds/01/commit.json"
    value = json.loads(commit.read_text())
    content = (run_dir / "rounds/01/scores.parquet").read_bytes()
    value["files"]["scores.parquet"] = hashlib.sha256(content).hexdigest()
    commit.write_text(json.dumps(value))
    return f"{run_dir}/rounds/01/scores.parquet: not valid Parquet"


def remove(run_dir: Path) -> str:
    (run_dir / "teacher/evaluation.json").unlink()
    return "teacher/evaluation.json: missing"


def break_the_recipe(run_dir: Path) -> str:
    (run_dir / "recipe.yaml").write_text("a: [")
    return f"{run_dir}/recipe.yaml: not valid YAML"


@pytest.mark.parametrize("spoil", [flip_a_byte, truncate, truncate_and_hide, remove, break_the_recipe])
def test_a_spoiled_run(run_dir: Path, spoil: Callable[[Path], str], ask: Ask) -> None:
    expected = spoil(run_dir)
    status, lines = ask("--verify", str(run_dir))
    assert status == 1
    assert [line for line in lines if not line.startswith(expected)] == []
    assert len(lines) == 1


@pytest.mark.parametrize("question", [["--verify"], ["--explain", "1"]])
def test_not_a_run_dir(tmp_path: Path, question: list[str], ask: Ask) -> None:
    (tmp_path / "notes.txt").touch()
    expected = f"error: {tmp_path}/recipe.yaml is missing: not a run directory"
    assert ask(*question, str(tmp_path)) == (2, [expected])


def test_a_round_is_explained(run_dir: Path) -> None:
    status, lines = process("--explain", "1", str(run_dir))
    decision = json.loads((run_dir / "rounds/01/decision.json").read_text())
    assert status == 0
    assert lines[0].startswith(f"round 1: block {decision['dropped_block']} went, ")
    assert any(line.startswith("runner-up: block ") for line in lines)


@pytest.mark.parametrize(
    ("round", "expected"),
    [
        ("2", "round 2 is not among the committed rounds: 1 to 1"),
        ("last", "--explain: ROUND 'last' is not a number"),
    ],
)
def test_a_round_that_is_not_there(run_dir: Path, round: str, expected: str, ask: Ask) -> None:
    assert ask("--explain", round, str(run_dir)) == (2, [f"error: {expected}"])


def test_before_the_first_round(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    status, (line,) = process("--explain", "1", str(run_dir))
    assert (status, line) == (2, f"error: {run_dir}/summary.json is missing: no round is committed yet")


@pytest.mark.parametrize("text", ["[]", "{}", '{"rounds": [{"round": 1}], "teacher": {}}'])
def test_a_broken_summary(run_dir: Path, text: str, ask: Ask) -> None:
    (run_dir / "summary.json").write_text(text)
    status, (line,) = ask("--explain", "1", str(run_dir))
    assert status == 2
    assert line.startswith(f"error: {run_dir}/summary.json: not a summary")
