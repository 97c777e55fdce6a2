"""Files of a run directory that were cut short or changed: named in one line, or of no consequence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pbd_ray.cluster.reading import print_explanation, print_problems

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

Damage = Callable[[bytes, np.random.Generator], bytes]


def flip_a_bit(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


CUTS: dict[str, Damage] = {
    "empty": lambda content, rng: b"",
    "half": lambda content, rng: content[: len(content) // 2],
    "all but a byte": lambda content, rng: content[:-1],
}
DAMAGES = CUTS | {"a bit": flip_a_bit}


def files(run_dir: Path) -> list[str]:
    return sorted(path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file())


def seeded(name: str, repeat: int = 0) -> np.random.Generator:
    return np.random.default_rng([repeat, *name.encode()])


@pytest.fixture
def run_dir(given: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(given, tmp_path / "run"))


def damaged(run_dir: Path, name: str, damages: dict[str, Damage], repeats: int = 1) -> Iterator[str]:
    """Every damage to a file, in words, while it is there."""
    path = run_dir / name
    content = path.read_bytes()
    for what, damage in damages.items():
        for repeat in range(repeats if damage is flip_a_bit else 1):
            path.write_bytes(damage(content, seeded(name, repeat)))
            yield f"{name}: {what} {repeat}"
    path.write_bytes(content)


def says_the_same(commit: Path, damaged: Path) -> bool:
    """Whether only what has no part in any hash was damaged: which driver wrote it, in which round."""
    before, after = (json.loads(path.read_text()) for path in (commit, damaged))
    return all(before[key] == after[key] for key in ("parent", "result", "parts", "files"))


def test_verify_names_every_damaged_file(run_dir: Path, given: Path, answer: Callable[..., Any]) -> None:
    wrong = []
    for name in files(run_dir):
        committed = name.startswith(("teacher/", "rounds/"))
        for case in damaged(run_dir, name, DAMAGES, repeats=2 if committed else 20):
            status, lines = answer(lambda: print_problems(str(run_dir)))
            if status == 0:
                # Such as another worker count in the recipe, or a commit without its last end of line.
                fine = not committed or says_the_same(given / name, run_dir / name)
            else:
                fine = status in (1, 2) and len(lines) == 1 and (name in lines[0])
                # A commit that lists another name or hash than the file has: nobody knows which one is wrong.
                folder = name.removesuffix("commit.json")
                fine |= name.endswith("commit.json") and all(
                    folder in line or "commit.json: parent" in line for line in lines
                )
            if not fine:
                wrong.append((case, status, lines))
    assert not wrong, "\n".join(map(str, wrong))


def test_explain_names_the_summary(run_dir: Path, answer: Callable[..., Any]) -> None:
    wrong = []
    for case in damaged(run_dir, "summary.json", DAMAGES, repeats=300):
        status, lines = answer(lambda: print_explanation(str(run_dir), "1"))
        named = status == 2 and len(lines) == 1 and ("summary.json" in lines[0] or "round 1" in lines[0])
        if status != 0 and not named:
            wrong.append((case, status, lines))
    assert not wrong, "\n".join(map(str, wrong))


def test_the_next_start_names_the_file_or_ends_alike(
    run_dir: Path,
    given: Path,
    teacher: Path,
    tmp_path: Path,
    compress_here: Callable[..., None],
    outcome: Callable[[Path], Any],
    answer: Callable[..., Any],
) -> None:
    """The last round is open again, with all its slices: a start reads what the rounds before have left."""
    for name in ("commit.json", "evaluation.json"):
        (run_dir / "rounds" / "02" / name).unlink()
    work, wrong, ended = tmp_path / "work", [], {"named": 0, "alike": 0}
    for number, name in enumerate(sampled(files(run_dir))):
        cut = list(CUTS)[number % len(CUTS)]
        damages = {cut: CUTS[cut], "a bit": flip_a_bit}
        if name.startswith(("teacher/", "rounds/01/")) and not name.endswith("commit.json"):
            del damages[cut]  # whatever the damage, its bytes are compared with those of the commit
        elif name.startswith("rounds/02/") and not name.endswith(".parquet"):
            del damages["a bit"]  # only a commit's hashes could tell
        shutil.copytree(run_dir, work)
        for case in damaged(work, name, damages):
            status, lines = answer(lambda: compress_here(work, teacher))
            if status == 0:
                fine = outcome(work) == outcome(given)
                ended["alike"] += 1
                shutil.rmtree(work)
                shutil.copytree(run_dir, work)
            else:
                fine = status in (1, 2) and len(lines) == 1 and name in lines[0]
                ended["named"] += 1
            if not fine:
                wrong.append((case, status, lines))
        shutil.rmtree(work)
    assert not wrong, "\n".join(map(str, wrong))
    assert min(ended.values()) > 5, ended


def sampled(names: list[str]) -> list[str]:
    """Of the slices in a folder the first only."""
    return [name for name in names if not re.search(r"/\d{4}\.parquet$", name) or "/0000." in name]
