"""Names that users chose, in a picture."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import matplotlib


@contextlib.contextmanager
def names_as_written() -> Iterator[None]:
    """Text is drawn letter by letter: no formula between dollar signs; what the font lacks is a box."""
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing", UserWarning)
        yield
