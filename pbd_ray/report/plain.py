"""Tables for a terminal or a job log."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table


def plain_text(table: Table, width: int) -> str:
    """A table without colours, without blanks at the ends of lines and empty lines around it."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")
