"""What a Ray job may write: nothing into the copy of the code that it runs in."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbd_ray.cluster.output import check_output, with_lasting_run_dir
from pbd_ray.config import ConfigError, load_recipe


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the driver of `ray job submit`."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")


def test_output_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_output(tmp_path / "new" / "out")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match="file is not a directory"):
            check_output(path)


@pytest.mark.parametrize("uri", ["s3://bucket/out", "gs://bucket/out"])
def test_output_that_is_a_uri(uri: str) -> None:
    """A Path loses a slash of it, and would name a directory here."""
    with pytest.raises(ConfigError, match="a directory, not a URI"):
        check_output(Path(uri))


def test_relative_output(in_job: None, tmp_path: Path) -> None:
    check_output(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^--output out: a Ray job runs in a copy of the code"):
        check_output(Path("out"))


def test_relative_output_outside_of_a_job() -> None:
    check_output(Path("out"))
    assert with_lasting_run_dir(load_recipe("demo")).run_dir == "runs/demo"


def test_run_dir_in_a_job(in_job: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert with_lasting_run_dir(load_recipe("demo")).run_dir == str(tmp_path / "runs" / "demo")
    for kept in ("/shared/run", "s3://bucket/run"):
        assert with_lasting_run_dir(load_recipe("demo", [f"run_dir={kept}"])).run_dir == kept
    with pytest.raises(ConfigError, match=r"^run_dir runs/mine: a Ray job runs in a copy of the code"):
        with_lasting_run_dir(load_recipe("demo", ["run_dir=runs/mine"]))
