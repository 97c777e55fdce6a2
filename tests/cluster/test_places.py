"""Room for what a run writes. Nodes that do not share it: tests/integration/test_preflight.py."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pbd_ray.cluster.places import PlaceError, check_places
from pbd_ray.config import Recipe, load_recipe
from pbd_ray.search.storage import Storage


def recipe(tiny_recipe: str, tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(tiny_recipe, ["backend=local", f"cache_dir={tmp_path / 'cache'}", *overrides])


def test_a_run_dir_that_is_too_small(tiny_recipe: str, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(PlaceError) as error:
        check_places(recipe(tiny_recipe, tmp_path), Storage.at(str(tmp_path / "a" / "run")), 5 * 10**15)
    found = re.fullmatch(
        rf"run_dir {tmp_path}/a/run: the run writes up to 5e\+06 GB more, and ([\d.e+]+) GB are free",
        str(error.value),
    )
    assert found and float(found[1]) == pytest.approx(free / 1e9, rel=0.1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_already_needs_no_room(tiny_recipe: str, tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    with (tmp_path / "rounds" / "model").open("wb") as sparse:
        sparse.truncate(10**12)
    storage = Storage.at(str(tmp_path))
    check_places(recipe(tiny_recipe, tmp_path), storage, 10**12)
    with pytest.raises(PlaceError, match="up to 1e\\+03 GB more"):
        check_places(recipe(tiny_recipe, tmp_path), storage, 2 * 10**12)


@pytest.mark.parametrize(("gigabytes", "said"), [("0", False), ("1e-3", False), ("1e6", True)])
def test_a_cache_that_will_be_cut_short(
    tiny_recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], gigabytes: str, said: bool
) -> None:
    check_places(
        recipe(tiny_recipe, tmp_path, f"cache_gigabytes={gigabytes}"), Storage.at(str(tmp_path / "run")), 0
    )
    line = (
        rf"cache_dir {tmp_path}/cache: this node lacks [\d.e+]+ GB of execution.cache_gigabytes=1e\+06: fewer"
    )
    assert bool(re.search(line, capsys.readouterr().out)) is said
