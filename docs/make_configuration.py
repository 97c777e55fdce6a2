"""Write docs/configuration.md, every key of a recipe, from pbd_ray/config.py.

python docs/make_configuration.py
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pbd_ray import config

TARGET = Path(__file__).with_name("configuration.md")
HEAD = """# Every key of a recipe

Made by `python docs/make_configuration.py` from `pbd_ray/config.py`; a test fails where the two differ.

A recipe is YAML of two parts. `experiment` decides the result: it is hashed, and a run directory only ever
holds rounds of one experiment. `execution` says where and with what it runs and may differ from one start to
the next. On the command line `key=value` overrides any value. `execution.` and `experiment.` may be left out:
`max_workers=4`, `stopping.max_drops=2`, `"alignment.learning_rates=[1e-4,1e-3]"`. An unknown key is refused.

Units stand in the names: `_frames` are frames of the video file, `_steps` of the input or feature grid. The
defaults are those of THUMOS14 and VideoMAE-S; the recipes in `pbd_ray/recipes/` show what a data set or a
model changes.
"""


def text() -> str:
    """The whole file."""
    sections = (_table(path, model) for path, model in _sections("", config.Recipe))
    return "\n".join([HEAD, *sections])


def _sections(path: str, model: type[config.Section]) -> Iterator[tuple[str, type[config.Section]]]:
    """Every section with its dotted path, in the order of the file."""
    for name, field in model.model_fields.items():
        for kind in _kinds(field.annotation):
            yield f"{path}{name}", kind
            yield from _sections(f"{path}{name}.", kind)


def _kinds(annotation: Any) -> list[type[config.Section]]:
    options = getattr(annotation, "__args__", (annotation,))
    return [kind for kind in options if isinstance(kind, type) and issubclass(kind, config.Section)]


def _table(path: str, model: type[config.Section]) -> str:
    told, schema = _docstrings(model), model.model_json_schema()
    lines = [f"## {path}", "", *_paragraph(model), "| key | default | value | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if field.is_required():
            default = "required"
        elif isinstance(field.default, config.Section):
            default = "as there"
        else:
            default = f"`{_yaml(field.default)}`"
        value = _value(schema["properties"][name])
        if _kinds(field.annotation):
            value = f"[section](#{path.replace('.', '')}{name})"
        lines.append(f"| `{name}` | {default} | {value} | {told.get(name, '')} |")
    return "\n".join([*lines, ""])


def _paragraph(model: type[config.Section]) -> list[str]:
    return [_line(inspect.cleandoc(model.__doc__ or "")), ""]


def _docstrings(model: type[config.Section]) -> dict[str, str]:
    """The string below each field."""
    (made,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(made, ast.ClassDef)
    found = {}
    for field, below in zip(made.body, made.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant)
            found[field.target.id] = _line(str(below.value.value))
    return found


def _line(words: str) -> str:
    """Words of a docstring for someone who writes YAML and has not read the design."""
    words = re.sub(r" \(design, [^)]*\)", "", " ".join(words.split()))
    return re.sub(r"\bNone\b", "`null`", words).replace("|", "\\|")


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = [list(each) if isinstance(each, tuple) else each for each in value]
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _value(schema: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "anyOf" in schema:
        return " or ".join(_value(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "value")
    if kind == "array":
        parts = schema.get("prefixItems")
        if parts:
            return "[" + ", ".join(_value(part) for part in parts) + "]"
        return f"list of {_value(schema['items'])}"
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join([words.get(kind, kind), *limits])


if __name__ == "__main__":
    TARGET.write_text(text())
    print(TARGET)
