"""DETAD's bins and thresholds from a user's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbd_ray.config import ConfigError
from pbd_ray.metrics.detad_rules import ACTIVITYNET, THUMOS14, load_rules


def test_built_in() -> None:
    assert load_rules("thumos14") is THUMOS14
    assert load_rules("activitynet") is ACTIVITYNET


def test_own_bins(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("tious: [0.5, 0.75]\nbins:\n  length: {edges: [0, 2, .inf], labels: [short, long]}\n")
    rules = load_rules(str(path))
    assert rules.tious == (0.5, 0.75)
    assert rules.bins["length"].edges == (0, 2, float("inf"))
    assert list(rules.bins) == ["length"]
    assert (rules.min_tiou, rules.groups, rules.min_precision) == (0.1, 10, 0.05)


GOOD = "bins: {length: {edges: [0, 1], labels: [a]}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"tious: []\n{GOOD}", "tious: "),
        (f"tious: [1.5]\n{GOOD}", "tious.0: "),
        ("tious: [0.5]\nbins: {}", "bins: "),
        ("tious: [0.5]", "bins: Field required"),
        ("tious: [0.5]\nbins: {width: {edges: [0, 1], labels: [a]}}", "bins.width"),
        ("tious: [0.5]\nbins: {length: {edges: [1, 0], labels: [a]}}", "edges [1.0, 0.0] do not rise"),
        ("tious: [0.5]\nbins: {length: {edges: [0, 1], labels: [a, b]}}", "2 labels for 2 edges"),
        ("tious: [0.5]\nbins: {length: {edges: [0, 1, 2], labels: [a, a]}}", "not distinct"),
        ("tious: [0.5]\nbins: {length: {edges: [0, .nan, 2], labels: [a, b]}}", "do not rise"),
        (f"tious: [0.5]\nbin: 3\n{GOOD}", "bin: "),
        ("- 3", "valid dictionary"),
        ("a: [", "cannot be read"),
    ],
)
def test_wrong_rules(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_rules(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neither_name_nor_file() -> None:
    with pytest.raises(ConfigError, match="'thumos15' are neither a file nor one of: thumos14, activitynet"):
        load_rules("thumos15")
