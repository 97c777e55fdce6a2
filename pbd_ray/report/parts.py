"""What a page is made of: figures with what they say in words, tables of texts, sections of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pbd_ray.report.svg import svg


@dataclass(frozen=True)
class Figure:
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: bool = False
    """Its cells are texts: to the left, and broken where they are long."""

    def __post_init__(self) -> None:
        assert {len(row) for row in self.rows} <= {len(self.columns)}, (
            f"{self.caption}: a cell for each column"
        )


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    title: str
    text: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    folded: tuple[Table, ...] = ()
    """Tables that are shown on demand."""


def figure(
    name: str, caption: str, told: Iterable[str], draw: Callable[[Any], None], height_inches: float = 3.2
) -> Figure:
    """A figure and its caption.

    Args:
        name: unique on its page.
        told: the figure's numbers in words, for those who do not see it.
        draw: draws on the axes it is given.
    """
    description = f"{caption} {'; '.join(told)}"
    return Figure(Markup(svg(name, description, draw, height_inches)), caption)


def row_height(rows: int) -> float:
    """Inches of a figure with a line of text for each of its rows."""
    return 0.9 + 0.24 * rows


def signed(value: float, low: float | None, high: float | None) -> str:
    """A difference and its interval."""
    return f"{value:+.4f}" if low is None or high is None else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
