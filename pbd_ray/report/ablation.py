"""The tables of an ablation as numbers (pure), as files and as plain text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 400
_LONGEST = 34
"""Characters of a column of lists in the text; the files hold all of it."""

SCHEMA = pa.schema(
    [
        ("table", pa.string()),
        ("row", pa.string()),
        ("drops", pa.int32()),
        ("runs", pa.int32()),
        ("seeds", pa.int32()),
        ("map", pa.float64()),
        ("deviation", pa.float64()),
        ("against", pa.string()),
        ("difference", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("unreliable", pa.bool_()),
        ("expected", pa.string()),
        ("verdict", pa.string()),
        ("smallest_seen", pa.float64()),
        ("paper_map", pa.float64()),
        ("blocks", pa.string()),
        ("learning_rates", pa.string()),
        ("trainable", pa.int64()),
        ("zeros", pa.float64()),
        ("negative", pa.float64()),
        ("dtype", pa.string()),
    ]
)


@dataclass(frozen=True)
class AblationRow:
    """One way to compress; None where it does not apply or was not run."""

    table: str
    row: str
    drops: int
    runs: int
    """Models that the row is the mean of."""
    seeds: int
    map: float | None
    """Headline mAP on the test videos, mean over runs."""
    deviation: float | None
    """Standard deviation of the runs' mAP; None of fewer than two."""
    against: str | None
    """The row that it is compared with."""
    difference: float | None
    """mAP of that row minus this one's, over the seeds that both have, and its interval."""
    low: float | None
    high: float | None
    unreliable: bool | None
    """Too few videos or seeds for the interval to be trusted."""
    expected: str | None
    """What the paper says of `against`: it lies 'above' this row, or 'at least' not below."""
    verdict: str | None
    """Of that: holds, contradicts, or undecided."""
    smallest_seen: float | None
    """Where undecided, the difference that could just have been seen; half the interval."""
    paper_map: float | None
    """The paper's own headline mAP (VideoMAE-S), where it is known."""
    blocks: str
    """Dropped, in order; runs are apart by '; '."""
    learning_rates: str
    """Chosen in the rounds of each run, in the same order."""
    trainable: int | None
    """Parameters of the backbone that the last alignment trains."""
    zeros: float | None
    """Exact zeros of the MLPs' hidden activations, mean over runs."""
    negative: float | None
    """Negative inputs of these activations."""
    dtype: str | None
    """In which the zeros were counted."""


@dataclass(frozen=True)
class AblationTable:
    letter: str
    title: str
    note: str
    confidence: float
    rows: tuple[AblationRow, ...]


def arrow_table(rows: Sequence[AblationRow]) -> pa.Table:
    """Rows of SCHEMA."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)


def ablation_text(table: AblationTable, headline: str) -> str:
    """A table for a terminal or a job log.

    Args:
        headline: what headline mAP means, such as 'mAP@0.5'.
    """
    text = Table(box=box.SIMPLE, pad_edge=False)
    sparse = any(row.zeros is not None for row in table.rows)
    trained = any(row.trainable is not None for row in table.rows)
    columns = ["", "drops", "runs", headline, "deviation", "paper", "compared with"]
    columns += [f"its lead ({table.confidence:.0%} interval)", "paper's ordering"]
    columns += ["trainable (backbone)"] * trained + ["zeros", "negative inputs"] * sparse
    columns += ["blocks dropped", "learning rates"]
    for place, column in enumerate(columns):
        text.add_column(column, justify="right" if 0 < place < 6 else "left", no_wrap=True)
    for row in table.rows:
        cells = [row.row, str(row.drops), str(row.runs), _number(row.map), _number(row.deviation)]
        cells += [_number(row.paper_map), row.against or "-", _interval(row), verdict_text(row)]
        cells += ["-" if row.trainable is None else f"{row.trainable:,}"] * trained
        cells += [_number(row.zeros), _number(row.negative)] * sparse
        text.add_row(*cells, _short(row.blocks), _short(row.learning_rates))
    stream = io.StringIO()
    print(f"Table {table.letter}: {table.title}", file=stream)
    Console(file=stream, width=_WIDTH, color_system=None).print(text)
    if table.note:
        print(table.note, file=stream)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines() if line.strip())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(row: AblationRow) -> str:
    if row.difference is None:
        return "-"
    doubt = " unreliable" if row.unreliable else ""
    return f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]{doubt}"


def verdict_text(row: AblationRow) -> str:
    """What became of the paper's ordering, and where it is undecided what could have been seen."""
    if row.verdict is None:
        return "-"
    if row.smallest_seen is None:
        return row.verdict
    if row.smallest_seen == 0:
        return f"{row.verdict} (not one video differs)"
    return f"{row.verdict} (sees {row.smallest_seen:.4f})"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
