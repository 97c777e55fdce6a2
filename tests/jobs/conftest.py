"""Running a job's `main` as the command line would."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def run_job(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """run_job("compress.py", "demo", ...) -> exit status and what was printed."""

    def run(name: str, *arguments: str) -> Outcome:
        spec = importlib.util.spec_from_file_location(f"jobs_{name.removesuffix('.py')}", JOBS / name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capfd.readouterr()
        status = module.main()
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run
