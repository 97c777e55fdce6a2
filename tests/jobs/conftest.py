"""Running a job's `main` as the command line would, and a run to ask."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pbd_ray.cluster.run import run_compression
from pbd_ray.config import load_recipe
from pbd_ray.data import synthetic
from pbd_ray.detector.bundle import save_bundle
from pbd_ray.detector.detector import Detector

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


@pytest.fixture(scope="session")
def healthy(tiny_recipe: str, video_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round; for reading only."""
    run_dir = tmp_path_factory.mktemp("healthy") / "run"
    overrides = ["backend=local", f"run_dir={run_dir}", f"cache_dir={video_cache}", "stopping.max_drops=1"]
    run_compression(load_recipe(tiny_recipe, overrides))
    return run_dir


@pytest.fixture
def run_dir(healthy: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(healthy, tmp_path / "run"))


@pytest.fixture(scope="session")
def videos(tiny_recipe: str, video_cache: Path) -> Path:
    """A folder of real videos with their annotations, as a user has it; for reading only."""
    config = load_recipe(tiny_recipe).experiment.data.synthetic
    assert config is not None
    return synthetic.ensure(config, video_cache)


@pytest.fixture(scope="session")
def bundle(tiny_recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of the tiny recipe that never learned anything, one block already dropped."""
    config = load_recipe(tiny_recipe).experiment.detector
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    torch.manual_seed(0)
    save_bundle(folder, Detector(config, 4, (0, 1, 3)), synthetic.CLASSES, {})
    return folder
