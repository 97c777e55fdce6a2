"""A start that finds a committed round altered: it names the file, and computes nothing on top of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pbd_ray.search.ledger import Ledger, LedgerError


@pytest.fixture
def half_way(tmp_path: Path, make_world: Callable[..., Any]) -> Path:
    """A run of which round 2 is still to be done."""
    run_dir = tmp_path / "run"
    make_world().run(str(run_dir))
    shutil.rmtree(run_dir / "rounds" / "02")
    return run_dir


def another_map(path: Path) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"headline_map": value["headline_map"] / 2}))


def another_weight(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def fewer_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path)[1:], path)


@pytest.mark.parametrize(
    ("name", "alter", "problem"),
    [
        ("teacher/evaluation.json", another_map, "bytes differ"),
        ("teacher/evaluation/0002.parquet", fewer_rows, "bytes differ"),
        ("teacher/evaluation/0002.parquet", Path.unlink, "is missing"),
        ("rounds/01/model/model.safetensors", another_weight, "bytes differ"),
        ("rounds/01/measured.json", Path.unlink, "is missing"),
    ],
)
def test_an_altered_file_is_named(
    half_way: Path, name: str, alter: Callable[[Path], None], problem: str, make_world: Callable[..., Any]
) -> None:
    alter(half_way / name)
    with pytest.raises(LedgerError, match=rf"^{half_way}/{name}.* {problem}.*/commit\.json lists") as error:
        make_world().run(str(half_way))
    assert "\n" not in str(error.value)
    assert not (half_way / "rounds" / "02" / "commit.json").exists()


def test_a_foreign_slice_is_not_read(half_way: Path) -> None:
    teacher = Ledger.existing(str(half_way)).teacher
    rows = teacher.read_slices("evaluation")
    slices = half_way / "teacher" / "evaluation"
    shutil.copy(slices / "0000.parquet", slices / "0009.parquet")
    assert teacher.read_slices("evaluation") == rows
    assert Ledger.existing(str(half_way)).teacher.read_slices("evaluation") == rows


def test_an_altered_commit_is_not_gone_on_from(half_way: Path, make_world: Callable[..., Any]) -> None:
    commit = half_way / "rounds" / "01" / "commit.json"
    commit.write_text(json.dumps(json.loads(commit.read_text()) | {"result": "0" * 64}))
    with pytest.raises(LedgerError, match=r"01/commit\.json: result is not the hash of its parts"):
        make_world().run(str(half_way))


def test_a_page_of_an_open_round_has_a_checksum(half_way: Path, make_world: Callable[..., Any]) -> None:
    (half_way / "rounds" / "01" / "commit.json").unlink()
    (half_way / "rounds" / "01" / "evaluation.json").unlink()
    name = "rounds/01/evaluation/0000.parquet"
    column = pq.ParquetFile(half_way / name).metadata.row_group(0).column(0)
    content = bytearray((half_way / name).read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    (half_way / name).write_bytes(content)
    with pytest.raises(LedgerError, match=rf"{name}: not valid Parquet"):
        make_world().run(str(half_way))
