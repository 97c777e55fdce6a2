"""A figure as SVG: themed by the page, safe beside others, and it says what it shows."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

from pbd_ray.report.svg import ACCENT, GRID, INK, MUTED, OUTCOMES, PAPER, SECOND, SERIES, svg

EVIL = '</text><script>alert(1)</script> $x_2$ & "quoted" -->'


def draw(axes: Any) -> None:
    axes.plot([0, 1], [0, 1], color=ACCENT, label=EVIL)
    axes.set_title(EVIL)
    axes.bar([0, 1], [1, 2], color=[SERIES[0], OUTCOMES[5]])
    axes.legend()


def test_texts_are_texts() -> None:
    """Whatever a class is called: well-formed, shown as it is, neither markup nor mathematics."""
    root = ET.fromstring(svg("figure", EVIL, draw))
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]
    assert texts.count(EVIL) == 2
    assert root.get("aria-label") == EVIL
    assert root.get("role") == "img"


def test_colours_are_the_pages() -> None:
    """No colour of matplotlib's is left, and those asked for are variables."""
    text = svg("figure", "", draw)
    assert not re.search(r"(?<!url\()#[0-9a-f]{6}\b", text)
    for name in ("ink", "muted", "grid", "accent", "series-0", "outcome-5"):
        assert f"var(--{name})" in text


def test_identifiers_are_the_figures_own() -> None:
    first, second = svg("one", "", draw), svg("two", "", draw)
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, own in zip((first, second), ids, strict=True):
        used = re.findall(r'(?:url\(#|href="#)([^")]+)', text)
        assert used
        assert set(used) <= own


def test_equal_numbers_give_equal_text() -> None:
    assert svg("figure", "", draw) == svg("figure", "", draw)


def test_marker_colours_are_distinct() -> None:
    """Each is replaced by one variable of the page: one shared by two would be shown as the later one."""
    listed = [INK, MUTED, GRID, PAPER, ACCENT, SECOND, *SERIES, *OUTCOMES]
    assert len(set(listed)) == len(listed)
