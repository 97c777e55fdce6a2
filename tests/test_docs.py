"""What the docs say of the code is what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from pbd_ray.config import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_configuration", ROOT / "docs" / "make_configuration.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_is_described(reference: ModuleType) -> None:
    assert reference.TARGET.read_text() == reference.text(), "run python docs/make_configuration.py"


def test_the_reference_is_complete(reference: ModuleType) -> None:
    """Every leaf of a whole recipe has its row."""
    sections = re.split(r"^## (.+)$", reference.text(), flags=re.MULTILINE)[1:]
    told = {
        f"{path}.{key}"
        for path, rows in zip(sections[::2], sections[1::2], strict=True)
        for key in re.findall(r"^\| `(\w+)`", rows, re.MULTILINE)
    }

    def leaves(value: object, path: str) -> set[str]:
        if isinstance(value, dict):
            return {leaf for key, each in value.items() for leaf in leaves(each, f"{path}.{key}")}
        return {path.removeprefix(".")}

    demo: Recipe = load_recipe("demo", ["alignment.halving=on"])
    assert leaves(demo.model_dump(), "") <= told


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = page.parent / file if file else page
        assert there.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, (
                target
            )


COMMAND = re.compile(r"(?<![\w/])((?:jobs|benchmarks|docs)/\w+\.py)([^`#\n]*)")
TAKE_OVERRIDES = ("jobs/ablate.py", "jobs/compress.py", "jobs/train_teacher.py")


def test_commands_name_scripts_options_and_keys_that_exist() -> None:
    """Of every script of ours on any page; every job is on one."""
    known = paths(load_recipe("demo", ["alignment.halving=on"]).model_dump())
    scripts, options, keys = set(), set(), set()
    for page in PAGES:
        for script, rest in COMMAND.findall(page.read_text().replace("\\\n", " ")):
            scripts.add(script)
            options |= {(script, option) for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)}
            if script in TAKE_OVERRIDES:
                keys |= set(re.findall(r"[\s\"']([a-z][a-z_.]+)=", rest)) - {"key"}
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    assert [one for one in options if f'"{one[1]}"' not in (ROOT / one[0]).read_text()] == []
    assert [key for key in keys if not {f".{key}", f".execution.{key}", f".experiment.{key}"} & known] == []
    assert {f"jobs/{job.name}" for job in (ROOT / "jobs").glob("*.py")} <= scripts
    assert {("jobs/compress.py", "--plan"), ("jobs/report.py", "--pick")} <= options
    assert {"run_dir", "teacher.source", "stopping.max_drops"} <= keys


def paths(value: object, path: str = "") -> set[str]:
    """All dotted paths of a recipe, those of sections too."""
    if not isinstance(value, dict):
        return {path}
    return {path}.union(*(paths(each, f"{path}.{key}") for key, each in value.items()))
