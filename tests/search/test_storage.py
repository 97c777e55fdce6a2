from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from pbd_ray.search.storage import LedgerError, Storage


@pytest.fixture(params=["local", "file uri", "subtree", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.at(str(tmp_path / "run"))
    if request.param == "file uri":
        return Storage.at(f"file://{tmp_path}/run")
    if request.param == "subtree":
        return Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")
    if request.param == "s3":
        return Storage.at(request.getfixturevalue("s3_uri")("some/run"))
    return Storage(fs._MockFileSystem(), "bucket/run")


def test_files(storage: Storage) -> None:
    assert storage.names() == ()
    assert not storage.exists("a/b.json")
    assert storage.read_json("a/b.json") is None
    storage.write_json("a/b.json", {"x": [1, 0.1]})
    storage.write("c", b"old")
    storage.write("c", b"new")
    assert storage.read("c") == b"new"
    assert storage.read_json("a/b.json") == {"x": [1, 0.1]}
    assert storage.names() == ("a/b.json", "c")
    assert storage.names(recursive=False) == ("c",)
    assert storage.names("a") == ("a/b.json",)
    storage.remove_folder("a")
    storage.remove_folder("a")
    assert storage.names() == ("c",)
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.json")


def test_tables_carry_the_facts_and_nothing_else(storage: Storage) -> None:
    table = pa.table({"x": [1, 2]}).replace_schema_metadata({"pandas": "{}"})
    storage.write_table("a.parquet", table)
    storage.write_table("b.parquet", table, {"epoch": "3"})
    assert storage.read_table("a.parquet").schema.metadata is None
    assert storage.read_table("b.parquet").schema.metadata == {b"epoch": b"3"}
    file = pq.ParquetFile(pa.BufferReader(storage.read("a.parquet")))
    assert b"pandas" not in (file.metadata.metadata or {})


def test_half_written_files_do_not_count_and_are_swept(storage: Storage) -> None:
    storage.write("a/x", b"1")
    storage._put(f"{storage.root}/a/x.tmp-123", b"")
    assert storage.names() == ("a/x",)
    storage.sweep()
    left = storage.filesystem.get_file_info(fs.FileSelector(storage.root, recursive=True))
    assert [info.base_name for info in left if info.is_file] == ["x"]


def test_nan_is_not_written(storage: Storage) -> None:
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json("a.json", [float("nan")])
    assert storage.names() == ()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("foo://bucket/run", "Unrecognized filesystem"),
        ("s3://", "names no directory"),
        ("/", "names no directory"),
    ],
)
def test_bad_locations(location: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message) as error:
        Storage.at(location)
    assert "\n" not in str(error.value)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(LedgerError, match="is a file"):
        Storage.at(str(tmp_path / "x"))


@pytest.mark.parametrize(("name", "content"), [("x.json", b"{"), ("x.json", b"\xff")])
def test_broken_json_is_named(storage: Storage, name: str, content: bytes) -> None:
    storage.write(name, content)
    with pytest.raises(LedgerError, match=r"run/x\.json(\?\S+)?: not valid JSON"):
        storage.read_json(name)


def test_broken_parquet_is_named(storage: Storage) -> None:
    storage.write("x.parquet", b"PAR1")
    with pytest.raises(LedgerError, match=r"run/x\.parquet(\?\S+)?: not valid Parquet"):
        storage.read_table("x.parquet")


def test_uri_keeps_the_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage.at("runs/one").uri("ray") == f"{tmp_path}/runs/one/ray"
    remote = Storage(fs.LocalFileSystem(), "b/p", "s3://b/p/?region=us-east-1")
    assert remote.uri("ray") == "s3://b/p/ray?region=us-east-1"


def test_create_writes_once(storage: Storage) -> None:
    assert storage.create("a/b.json", b"first")
    assert not storage.create("a/b.json", b"second")
    assert storage.read("a/b.json") == b"first"
    left = storage.filesystem.get_file_info(fs.FileSelector(storage.root, recursive=True))
    assert [info.base_name for info in left if info.is_file] == ["b.json"]
    assert storage.exclusive == (storage.filesystem.type_name == "local")


def test_an_empty_root_is_removed_and_no_other(tmp_path: Path) -> None:
    storage = Storage.at(str(tmp_path / "a" / "run"))
    storage.make_root()
    storage.write("x", b"1")
    storage.remove_empty_root()
    assert storage.exists("x")
    (tmp_path / "a" / "run" / "x").unlink()
    storage.remove_empty_root()
    storage.remove_empty_root()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
