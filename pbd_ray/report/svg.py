"""Small figures as SVG inside a page: matplotlib draws them, the page's style sheet colours them.

A figure is drawn in marker colours, which no figure uses for anything else, and in the SVG each of them
is replaced by a CSS variable of the page; so one figure follows the light and the dark theme, and prints.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
ACCENT, SECOND = "#010201", "#010202"
SERIES = tuple(f"#0103{index:02x}" for index in range(6))
"""For lines that are told apart by a legend; after the last the first comes again."""
OUTCOMES = tuple(f"#0104{index:02x}" for index in range(6))
"""What DETAD says a detection can be, in the order of `metrics.detad.OUTCOMES`."""

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", ACCENT: "accent", SECOND: "second"}
_VARIABLES |= {color: f"series-{index}" for index, color in enumerate(SERIES)}
_VARIABLES |= {color: f"outcome-{index}" for index, color in enumerate(OUTCOMES)}

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.facecolor": "none",
    "font.size": 10.0,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "svg.fonttype": "none",
    "svg.hashsalt": "pbd_ray",
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
_WIDTH_INCHES = 5.0


def svg(name: str, description: str, draw: Callable[[Any], None], height_inches: float = 3.2) -> str:
    """A figure of one axes as an `<svg>` element, equal for equal numbers.

    Args:
        name: unique on its page: identifiers inside the figure begin with it.
        description: what the figure says, for those who do not see it.
        draw: draws on the axes it is given, in the colours of this module.
    """
    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        draw(figure.subplots())
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, dpi=72)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub(r"#01010[1-4]|#01020[12]|#010[34]0[0-5]", lambda m: f"var(--{_VARIABLES[m[0]]})", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None, "matplotlib's SVG has a viewBox"
    label = html.escape(description)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {spaces} role="img" aria-label="{label}" {view[0]}>'
    return head + text[text.index(">") + 1 :].strip()
