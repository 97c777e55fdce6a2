"""An ablation as one offline page: the verdicts on the paper's orderings first, then every table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

from pbd_ray.report.ablation import AblationRow, AblationTable, verdict_text
from pbd_ray.report.panels import draw_rows
from pbd_ray.report.parts import Figure, Part, Table, figure, row_height, signed
from pbd_ray.report.templates import render

PAGE = "ablation.html"


def ablation_page(
    tables: Sequence[AblationTable], name: str, headline: str, recipe: str, missing: Mapping[str, str]
) -> str:
    """The whole page as HTML.

    Args:
        name: of the experiment.
        headline: what headline mAP means, such as 'mAP@0.5'.
        recipe: the recipe that all arms begin with, as YAML.
        missing: run -> why it is not among the rows.
    """
    judged = [row for table in tables for row in table.rows if row.verdict is not None]
    counts = Counter(row.verdict for row in judged)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("holds", "contradicts", "undecided"))
    text = (
        "The paper's supplement says which way of compressing lies above which, or not below it. A verdict "
        "is on that ordering alone, here: it holds where the whole interval of the difference lies above 0 "
        "(not below: above minus the recipe's margin), contradicts where it lies below, else it is "
        "undecided, with the smallest difference that could have been told from none. The paper's numbers "
        "are of VideoMAE-S on its data set and stand there for their order, not to be reached."
    )
    return render(
        "ablation.html.j2",
        title=f"{name}: ablation",
        name=name,
        heading=f"Of {len(judged)} orderings of the paper: {verdicts}" if judged else "Ablation",
        text=text,
        missing=tuple(f"{run}: {why}" for run, why in missing.items()),
        verdicts=_verdicts(judged),
        parts=[_part(table, headline) for table in tables],
        recipe=recipe,
    )


def _verdicts(rows: Sequence[AblationRow]) -> Table:
    columns = ("table", "the paper says", "difference (interval)", "here")
    return Table("The paper's orderings", columns, tuple((row.table, *_claim(row)) for row in rows))


def _claim(row: AblationRow) -> tuple[str, str, str]:
    relation = "above" if row.expected == "above" else "not below"
    return f"{row.against} {relation} {row.row}", _difference(row), verdict_text(row)


def _part(table: AblationTable, headline: str) -> Part:
    sparse = any(row.zeros is not None for row in table.rows)
    trained = any(row.trainable is not None for row in table.rows)
    columns = ["", "drops", "runs", headline, "deviation", "paper", "compared with", "its lead (interval)"]
    columns += ["trainable, backbone"] * trained + ["zeros", "negative inputs"] * sparse
    details = ("", "blocks dropped, a run after the other", "learning rates")
    return Part(
        f"Table {table.letter}: {table.title}",
        table.note,
        () if all(row.map is None for row in table.rows) else (_figure(table, headline),),
        (Table(f"Intervals: {table.confidence:.0%}", tuple(columns), _rows(table, sparse, trained)),),
        (
            Table(
                "Runs", details, tuple((row.row, row.blocks, row.learning_rates) for row in table.rows), True
            ),
        ),
    )


def _figure(table: AblationTable, headline: str) -> Figure:
    rows = [row for row in table.rows if row.map is not None]
    told = (f"{row.row} {row.map:.4f}" for row in rows)
    caption = f"{headline} of every row; the bar is the standard deviation of its runs."
    draw = partial(draw_rows, rows=rows, name=headline)
    return figure(f"table-{table.letter}", caption, told, draw, row_height(len(rows)))


def _rows(table: AblationTable, sparse: bool, trained: bool) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            row.row,
            str(row.drops),
            str(row.runs),
            _number(row.map),
            _number(row.deviation),
            _number(row.paper_map),
            row.against or "–",
            _difference(row),
            *(["–" if row.trainable is None else f"{row.trainable:,}"] * trained),
            *([_number(row.zeros), _number(row.negative)] * sparse),
        )
        for row in table.rows
    )


def _difference(row: AblationRow) -> str:
    if row.difference is None:
        return "–"
    return signed(row.difference, row.low, row.high) + (" unreliable" if row.unreliable else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
