"""The page in a real browser: wide and narrow, light and dark, and on paper."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pbd_ray.report.evidence import Evidence
from pbd_ray.report.page import report_page

pytestmark = pytest.mark.slow

OFFLINE = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--no-first-run",
)
# A theme changes colours and nothing else, a width changes everything else.
wide_and_narrow = pytest.mark.parametrize("opened", [(1280, "light"), (390, "light")], indirect=True, ids=str)
light_and_dark = pytest.mark.parametrize("opened", [(1280, "light"), (1280, "dark")], indirect=True, ids=str)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        if os.environ.get("PBD_RAY_REQUIRE_CHROMIUM") == "1":
            pytest.fail("PBD_RAY_REQUIRE_CHROMIUM is set but Chromium is not installed")
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=OFFLINE)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report_page(evidence), encoding="utf-8")
    return path.as_uri()


@dataclass
class Opened:
    page: Page
    messages: list[str] = field(default_factory=list)
    """Of the console, errors, and requests for anything but the page."""

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture
def opened(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """The page, in a window of (width in pixels, theme)."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found = Opened(page)
    page.on("console", lambda message: found.messages.append(message.text))
    page.on("pageerror", lambda error: found.messages.append(str(error)))
    page.on("request", lambda sent: found.messages.append(sent.url) if sent.url != address else None)
    page.goto(address)
    yield found
    page.close()


LUMINANCE = """(color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""
"""Relative luminance as WCAG 2 defines it."""


def contrast(opened: Opened, selector: str, style: str) -> float:
    """Of an element's colour to the page's ground (WCAG 2): 1 to 21."""
    return float(
        opened.ask(
            f"""(() => {{
            const luminance = {LUMINANCE};
            const [a, b] = [getComputedStyle(document.querySelector('{selector}')).{style},
                            getComputedStyle(document.body).backgroundColor].map(luminance);
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            }})()"""
        )
    )


@light_and_dark
def test_quiet_and_offline(opened: Opened) -> None:
    assert [message for message in opened.messages if not message.startswith("data:")] == []


@wide_and_narrow
def test_nothing_is_wider_than_the_screen(opened: Opened) -> None:
    """The page does not scroll sideways; what is wider than the screen scrolls in a box of its own."""
    assert opened.ask("document.documentElement.scrollWidth <= window.innerWidth")
    opened.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert opened.ask("document.documentElement.scrollWidth <= window.innerWidth")
    sticking_out = """[...document.querySelectorAll('body *')].filter(e =>
        !e.closest('.scroll, pre, svg') && e.getBoundingClientRect().right > window.innerWidth + 1
    ).map(e => e.outerHTML.slice(0, 80))"""
    assert opened.ask(sticking_out) == []


@wide_and_narrow
def test_figures_are_large_and_whole(opened: Opened) -> None:
    """Every text of a figure lies inside it, in letters that can be read, whatever font the system has."""
    facts = opened.ask(
        """[...document.querySelectorAll('figure svg')].map(svg => {
            const box = svg.getBoundingClientRect();
            const texts = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
            return {
                width: box.width,
                label: svg.getAttribute('aria-label').length,
                outside: texts.filter(t => t.left < box.left - 3 || t.right > box.right + 3
                    || t.top < box.top - 3 || t.bottom > box.bottom + 3).length,
                smallest: Math.min(...texts.map(t => Math.min(t.height, t.width > 4 ? t.height : 99))),
            };
        })"""
    )
    assert len(facts) == 19
    for one in facts:
        assert one["width"] >= 330
        assert one["label"] > 40
        assert one["outside"] == 0
        assert one["smallest"] >= 8


@light_and_dark
def test_it_can_be_read(opened: Opened) -> None:
    """Contrast: 7 for text (WCAG AAA), 3 for what figures draw with (non-text)."""
    assert contrast(opened, "h1", "color") >= 7
    assert contrast(opened, "figure svg text", "fill") >= 7
    assert contrast(opened, "figcaption", "color") >= 4.5
    assert contrast(opened, ".depths .kept", "backgroundColor") >= 3


@light_and_dark
def test_themes_differ(opened: Opened) -> None:
    dark = opened.ask("matchMedia('(prefers-color-scheme: dark)').matches")
    ground = opened.ask(f"({LUMINANCE})(getComputedStyle(document.body).backgroundColor)")
    assert ground < 0.1 if dark else ground > 0.9


@light_and_dark
def test_on_paper(opened: Opened) -> None:
    """White, whatever the screen's theme is, with figures in dark ink and every table whole and unfolded."""
    shown = "e.checkVisibility({contentVisibilityAuto: true})"
    folded = f"[...document.querySelectorAll('details table')].map(e => {shown})"
    assert set(opened.ask(folded)) == {False}
    opened.page.emulate_media(media="print")
    assert opened.ask(f"({LUMINANCE})(getComputedStyle(document.body).backgroundColor)") == pytest.approx(1.0)
    assert contrast(opened, "figure svg text", "fill") >= 7
    assert opened.ask(
        "[...document.querySelectorAll('.scroll')].every(e => getComputedStyle(e).overflowX == 'visible')"
    )
    paper = opened.page.pdf(format="A4", print_background=True)
    assert paper.startswith(b"%PDF")
    assert 3 <= paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") <= 20
