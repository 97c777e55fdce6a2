"""What every tier shares: where the reference data lies, and one seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

SHARED = Path(__file__).parents[2] / "shared"
COPIES = Path(__file__).parent / "golden" / "data"
REQUIRED = os.environ.get("PBD_RAY_REQUIRE_SHARED") == "1"


def shared_folder() -> Path:
    if not SHARED.is_dir():
        if REQUIRED:
            pytest.fail("PBD_RAY_REQUIRE_SHARED is set but ../shared is not there")
        pytest.skip("the reference data (../shared) is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers and real data beside the project."""
    return shared_folder()


@pytest.fixture(scope="session")
def reference_file() -> Callable[[str], Path]:
    """reference_file(name) -> a file of ../shared/reference, or its copy in tests/golden/data without it."""

    def find(name: str) -> Path:
        copy = COPIES / name
        if not SHARED.is_dir() and not REQUIRED and copy.is_file():
            return copy
        return shared_folder() / "reference" / name

    return find


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


TINY = str(Path(__file__).parent / "recipes" / "tiny.yaml")


@pytest.fixture(scope="session")
def tiny_recipe() -> str:
    """A recipe that runs every stage in seconds."""
    return TINY


@pytest.fixture(scope="session")
def video_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embedded videos of tiny recipes are generated, once for all tests."""
    return tmp_path_factory.mktemp("cache")
