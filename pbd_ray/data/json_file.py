"""JSON files that users hand over: every error names file, field and value in one line."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pbd_ray.config import UserError, one_line

LARGEST = 1e9
"""Beyond this a number of seconds, frames or score is a broken file; int64 and float64 stay exact below."""

SHOWN = 100
"""Characters of a wrong value or key that an error message quotes."""


class AnnotationError(UserError):
    """An annotation or detection file, or what a recipe asks of it, is wrong. One line for the user."""


def shown(value: Any) -> str:
    """A value of a file, or its beginning where that would not fit into a line."""
    text = repr(value[:SHOWN]) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without byte order mark.

    Raises:
        AnnotationError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise AnnotationError(f"{path}: cannot be read: {reason}") from None


class JsonNode:
    """A value of a JSON or other text file that knows where it stands: errors name file, field and value."""

    __slots__ = ("key", "parent", "value")

    def __init__(self, value: Any, key: str, parent: JsonNode | None = None) -> None:
        self.value, self.key, self.parent = value, key, parent

    @staticmethod
    def read(path: str | Path) -> JsonNode:
        def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            members = dict(pairs)
            if len(members) != len(pairs):
                key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
                raise AnnotationError(f"{path}: key {shown(key)} stands twice in one object")
            return members

        text = read_text(path)
        try:
            return JsonNode(json.loads(text, object_pairs_hook=distinct), str(path))
        except AnnotationError:
            raise
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"{path}: not JSON: {one_line(error)}") from None

    @property
    def where(self) -> str:
        """File and field."""
        node, field = self, ""
        while node.parent is not None:
            node, field = node.parent, node.key + field
        return f"{node.key}: {field.removeprefix('.')}" if field else node.key

    def error(self, problem: str) -> AnnotationError:
        return AnnotationError(f"{self.where}: {problem}, got {shown(self.value)}")

    def items(self) -> Iterator[tuple[str, JsonNode]]:
        if not isinstance(self.value, dict):
            raise self.error("expected an object")
        for key, value in self.value.items():
            yield key, JsonNode(value, f"[{shown(key)}]", self)

    def elements(self) -> Iterator[JsonNode]:
        if not isinstance(self.value, list):
            raise self.error("expected a list")
        for index, value in enumerate(self.value):
            yield JsonNode(value, f"[{index}]", self)

    def member(self, key: str, required: bool = True) -> Any:
        """The member `key`; None where it is optional and absent or null."""
        if not isinstance(self.value, dict):
            raise self.error("expected an object")
        if key not in self.value and required:
            raise self.error(f"expected a member {key!r}")
        value = self.value.get(key)
        return None if value is None and not required else JsonNode(value, f".{key}", self)

    def text(self) -> str:
        # Unprintable characters (also lone surrogates) would break one-line messages and UTF-8 files later.
        if not isinstance(self.value, str) or not self.value or not self.value.isprintable():
            raise self.error("expected a printable, non-empty text")
        return self.value

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.error("expected a number")
        if not abs(self.value) <= LARGEST:  # also NaN
            raise self.error(f"expected a finite number, at most {LARGEST:g} in size")
        return float(self.value)

    def positive(self) -> float:
        if not self.number() > 0:
            raise self.error("expected more than 0")
        return float(self.value)

    def segment(self) -> tuple[float, float]:
        ends = [node.number() for node in self.elements()]
        if len(ends) != 2:
            raise self.error("expected [start, end]")
        if ends[1] < ends[0]:
            raise self.error("the segment ends before it starts")
        return ends[0], ends[1]

    def check_inside_root(self, name: str) -> None:
        """Refuse a video id or file that would lead out of the data root."""
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or ".." in parts or not parts[0] or parts[-1] in ("", "."):
            raise self.error(f"{shown(name)} is not a name inside the data root")
