"""The golden files in the repository are those of the reference set, and few."""

from __future__ import annotations

from pathlib import Path

import pytest

COPIES = Path(__file__).parent / "data"


@pytest.mark.golden
@pytest.mark.parametrize("path", sorted(COPIES.glob("*.[!m]*")), ids=lambda path: path.name)
def test_copies_equal_the_reference_set(shared: Path, path: Path) -> None:
    assert path.read_bytes() == (shared / "reference" / path.name).read_bytes()


def test_copies_are_small_and_each_is_explained() -> None:
    files = [path for path in COPIES.iterdir() if path.suffix != ".md"]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    readme = (COPIES / "README.md").read_text()
    assert [path.name for path in files if f"`{path.name}`" not in readme] == []
