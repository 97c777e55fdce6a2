"""Pages as HTML: nothing in them is loaded from elsewhere, and all that is not markup of ours is escaped."""

from __future__ import annotations

from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup


def render(template: str, **values: object) -> str:
    """A page from one of the templates in this folder, with the style sheet that all of them share."""
    style = resources.files(__name__).joinpath("page.css").read_text(encoding="utf-8")
    return _environment().get_template(template).render(style=Markup(style), **values)


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FunctionLoader(lambda name: resources.files(__name__).joinpath(name).read_text("utf-8"))
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
