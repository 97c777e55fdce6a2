"""Where the mAP of a bundle is looked up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.detector.bundle import Bundle, BundleError
from pbd_ray.search.known_map import known_test_map
from pbd_ray.search.storage import LedgerError

STRANGER = Bundle(None, None, (), (), {})  # type: ignore[arg-type]  # only its facts are looked at
FITTED = replace(STRANGER, facts={"test_map": {"0.5": 0.75}})


@pytest.mark.parametrize("place", ["teacher", "rounds/01/model", "rounds/02/model"])
def test_in_a_run_directory(place: str, tmp_path: Path, make_world: Callable[..., Any]) -> None:
    make_world().run(str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    entry = summary["teacher"] if place == "teacher" else summary["rounds"][int(place[8]) - 1]
    expected = {float(tiou): value for tiou, value in entry["map"].items()}
    assert known_test_map(tmp_path / "run" / place, FITTED) == expected
    path = tmp_path / "run" / place.removesuffix("/model") / "evaluation.json"
    path.write_text(path.read_text().replace("0", "1"))
    with pytest.raises(LedgerError, match=r"evaluation\.json"):
        known_test_map(tmp_path / "run" / place, FITTED)


def test_elsewhere(tmp_path: Path) -> None:
    assert known_test_map(tmp_path / "model", FITTED) == {0.5: 0.75}
    assert known_test_map(tmp_path / "model", STRANGER) is None
    for wrong in ([], {"a": 1}, {"0.5": None}):
        with pytest.raises(BundleError, match=r"config\.json: facts\.test_map is"):
            known_test_map(tmp_path / "model", replace(STRANGER, facts={"test_map": wrong}))
