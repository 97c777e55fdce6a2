"""Undisturbed runs to compare with, and what a run directory says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pbd_ray.cluster.monitoring import exit_status
from pbd_ray.cluster.run import run_compression
from pbd_ray.config import load_recipe

RECIPE = str(Path(__file__).parents[1] / "recipes" / "chaos.yaml")


@dataclass(frozen=True)
class Outcome:
    """What must not depend on what died on the way."""

    results: tuple[str, ...]
    """`result` of the teacher's commit and of every round's."""
    dropped: tuple[int, ...]

    @classmethod
    def of(cls, run_dir: Path) -> Outcome:
        folders = [run_dir / "teacher", *sorted((run_dir / "rounds").iterdir())]
        summary = json.loads((run_dir / "summary.json").read_text())
        return cls(
            tuple(json.loads((folder / "commit.json").read_text())["result"] for folder in folders),
            tuple(entry["dropped_block"] for entry in summary["rounds"]),
        )


@pytest.fixture(scope="session")
def overrides(video_cache: Path) -> Callable[..., list[str]]:
    """overrides(run_dir, teacher, "key=value", ...): of the chaos recipe; no teacher: it is fitted."""

    def of(run_dir: Path | str, teacher: Path | None, *more: str) -> list[str]:
        given = [] if teacher is None else [f"teacher.source={teacher}"]
        return [f"run_dir={run_dir}", f"cache_dir={video_cache}", *given, *more]

    return of


@pytest.fixture(scope="session")
def command(overrides: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """command(run_dir, teacher, "key=value", ...): what a user starts."""
    return lambda *arguments: ["jobs/compress.py", RECIPE, *overrides(*arguments)]


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], Outcome]:
    """outcome(run_dir): to be compared with another run's."""
    return Outcome.of


@pytest.fixture(scope="session")
def compress_here(overrides: Callable[..., list[str]]) -> Callable[..., None]:
    """compress_here(run_dir, teacher, "key=value", ...): the run in this process, without Ray."""

    def run(run_dir: Path | str, teacher: Path | None, *more: str) -> None:
        run_compression(load_recipe(RECIPE, [*overrides(run_dir, teacher, *more), "backend=local"]))

    return run


@pytest.fixture
def answer(capfd: pytest.CaptureFixture[str]) -> Callable[[Callable[[], int | None]], tuple[int, list[str]]]:
    """answer(action) -> exit status of a job that does it, and the lines on stderr but for progress and
    warnings; where the status is 0, those on stdout."""

    def ask(action: Callable[[], int | None]) -> tuple[int, list[str]]:
        capfd.readouterr()
        status = exit_status(action)
        out, err = capfd.readouterr()
        lines = (out if status == 0 else out + err).splitlines()
        return status, [line for line in lines if not line.startswith(("[", "mAP: "))]

    return ask


@pytest.fixture(scope="session")
def fitted(compress_here: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an undisturbed run that fits its teacher."""
    run_dir = tmp_path_factory.mktemp("fitted") / "run"
    compress_here(run_dir, None)
    return run_dir


@pytest.fixture(scope="session")
def teacher(fitted: Path) -> Path:
    """A teacher that need not be fitted."""
    return fitted / "teacher"


@pytest.fixture(scope="session")
def given(
    compress_here: Callable[..., None], teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Directory of an undisturbed run from that teacher."""
    run_dir = tmp_path_factory.mktemp("given") / "run"
    compress_here(run_dir, teacher)
    return run_dir
