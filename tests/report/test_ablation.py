"""Tables of an ablation as files and as text."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from pyarrow import csv

from pbd_ray.report.ablation import SCHEMA, AblationRow, AblationTable, ablation_text, arrow_table
from pbd_ray.report.ablation_page import ablation_page

BEST = AblationRow(
    table="E", row="fine-tuned", drops=2, runs=3, seeds=3, map=0.91, deviation=0.0123, against=None,
    difference=None, low=None, high=None, unreliable=None, expected=None, verdict=None, smallest_seen=None,
    paper_map=0.7137, blocks="2, 4; 2, 5; 2, 4", learning_rates="0.0001, 1e-05; 0.001, 0.001; 0.0001, 0.001",
    trainable=None, zeros=None, negative=None, dtype=None,
)  # fmt: skip
WORSE = replace(
    BEST, row="not", map=0.9, against="fine-tuned", difference=0.01, low=-0.02, high=0.04, unreliable=True,
    expected="above", verdict="undecided", smallest_seen=0.03, paper_map=None, deviation=None,
)  # fmt: skip


def text(*rows: AblationRow) -> str:
    return ablation_text(AblationTable("E", "fine-tuning", "a note", 0.95, rows), "mAP@0.5")


def test_files_hold_every_field() -> None:
    assert SCHEMA.names == [field.name for field in fields(AblationRow)]
    table = arrow_table([BEST, WORSE])
    assert table.to_pylist() == [asdict(BEST), asdict(WORSE)]
    written = io.BytesIO()
    csv.write_csv(table, written)
    read = csv.read_csv(io.BytesIO(written.getvalue())).to_pylist()
    assert [row["difference"] for row in read] == [None, 0.01]
    assert read[0]["blocks"] == BEST.blocks


def test_text() -> None:
    lines = text(BEST, WORSE).splitlines()
    assert (lines[0], lines[-1]) == ("Table E: fine-tuning", "a note")
    assert "its lead (95% interval)" in lines[1] and "zeros" not in lines[1] and "trainable" not in lines[1]
    assert lines[3].split("  ")[0].strip() == "fine-tuned"
    for shown in ("0.9100", "0.0123", "0.7137", "2, 4; 2, 5; 2, 4"):
        assert shown in lines[3]
    assert "+0.0100 [-0.0200, +0.0400] unreliable" in lines[4]
    assert "undecided (sees 0.0300)" in lines[4]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"verdict": "holds", "smallest_seen": None}, "holds"),
        ({"smallest_seen": 0.0}, "undecided (not one video differs)"),
        ({"trainable": 12345}, "12,345"),
        ({"zeros": 0.7, "negative": 0.65}, "0.7000"),
        ({"map": None, "difference": None, "low": None, "high": None}, "-"),
    ],
)
def test_what_a_row_may_lack_or_have(change: dict[str, object], shown: str) -> None:
    assert shown in text(BEST, replace(WORSE, **change)).splitlines()[4]  # type: ignore[arg-type]


def test_page(parse: Callable[[str], Any]) -> None:
    """Verdicts first, each table with its figure; what a user named is escaped."""
    holds = replace(WORSE, row="<i>none</i>", verdict="holds", smallest_seen=None, low=0.001)
    tables = [
        AblationTable("E", "fine-tuning", "a note", 0.95, (BEST, WORSE, holds)),
        AblationTable("C", "sparse", "", 0.95, (replace(BEST, zeros=0.75, negative=0.5, dtype="float32"),)),
    ]
    page = parse(ablation_page(tables, "a <run>", "mAP@0.5", "recipe: 1", {"full-seed0": "loss <nan>"}))
    texts = " ".join(page.texts)
    assert "Of 2 orderings of the paper: 1 holds, 0 contradicts, 1 undecided" in texts
    assert [line for line in page.texts if line == "full-seed0: loss <nan>"]
    assert "fine-tuned above <i>none</i>" in texts
    assert "undecided (sees 0.0300)" in texts
    assert "+0.0100 [-0.0200, +0.0400] unreliable" in texts
    assert "0.7500" in texts
    assert not page.all("i")
    figures = page.all("svg")
    assert [figure["role"] for figure in figures] == ["img", "img"]
    assert "not 0.9000" in figures[0]["aria-label"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
