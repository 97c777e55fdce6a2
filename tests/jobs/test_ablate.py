"""A small ablation in one process: killed, failed, gone on with; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pbd_ray.cluster import ablation_sweep
from pbd_ray.compression.finetune import Diverged
from pbd_ray.compression.jobs import FineTuneJob
from pbd_ray.detector.bundle import load_bundle
from pbd_ray.search import relu_swap
from pbd_ray.search.storage import LedgerError, Storage

SMALL = (
    "backend=local",
    "experiment.stopping.max_drops=1",
    "alignment.learning_rates=[1.0e-3]",
    "alignment.optimizer.epochs=1",
    "alignment.optimizer.schedule_epochs=1",
    "teacher.optimizer.epochs=1",
    "teacher.optimizer.schedule_epochs=1",
)
RUNS = ("ours", "none-greedy", "none-same-order", "relu")


class Killed(BaseException):
    """The driver dies here: nothing below catches it."""


@pytest.fixture
def ablate(run_job: Callable[..., Any], tiny_recipe: str, video_cache: Path) -> Callable[..., Any]:
    def run(output: Path, *more: str) -> Any:
        given = ("--tables", "C,E", "--seeds", "4", *more)
        return run_job(
            "ablate.py", tiny_recipe, *SMALL, f"cache_dir={video_cache}", "--output", str(output), *given
        )

    return run


def results(output: Path) -> dict[str, str]:
    """Every result that the directory holds: of rounds by their hash, of what has none by its bytes."""
    found = {
        str(path.relative_to(output)): json.loads(path.read_text())["result"]
        for path in output.rglob("commit.json")
    }
    others = [*output.glob("tables/*.csv"), *output.glob("arms/relu-*/sparsity.json")]
    others += output.glob("arms/relu-*/rounds/01/model/model.safetensors")
    return found | {str(path.relative_to(output)): path.read_bytes().hex() for path in others}


def test_killed_failed_and_gone_on_with(
    ablate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    whole = ablate(undisturbed)
    assert whole.status == 0, whole.err
    assert {path.name for path in (undisturbed / "arms").iterdir()} == {f"{run}-seed4" for run in RUNS}

    monkeypatch.setattr(ablation_sweep, "attempt", lambda task, shared, say: "out of luck")
    none = ablate(disturbed)
    monkeypatch.undo()
    assert none.status == 1
    assert "ours-seed4: out of luck; none-greedy-seed4: out of luck; relu-seed4: needs ours-seed4" in none.err
    assert pq.read_table(disturbed / "tables" / "E.parquet").column("runs").to_pylist() == [0] * 4

    write = Storage.write

    def dies(storage: Storage, name: str, content: bytes) -> None:
        if name.endswith("rounds/01/evaluation.json"):
            raise Killed(name)
        write(storage, name, content)

    monkeypatch.setattr(Storage, "write", dies)
    with pytest.raises(Killed):
        ablate(disturbed)
    monkeypatch.setattr(Storage, "write", write)
    assert not (disturbed / "arms" / "ours-seed4" / "rounds" / "01" / "commit.json").exists()
    teacher = (disturbed / "teacher" / "model.safetensors").stat().st_mtime_ns
    aligned = (disturbed / "arms" / "ours-seed4" / "rounds" / "01" / "alignment.parquet").stat().st_mtime_ns

    def diverges(job: FineTuneJob, *rest: Any) -> None:
        assert job.guide is not None and job.guide.backbone.activation == "gelu"
        assert job.experiment.detector.backbone.activation == "relu"
        raise Diverged("loss nan at step 3")

    monkeypatch.setattr(relu_swap, "fit_grid", diverges)
    failed = ablate(disturbed)
    monkeypatch.undo()
    assert failed.status == 1
    assert "error: 1 runs failed (relu-seed4: loss nan at step 3); the same command goes on" in failed.err
    assert "Traceback" not in failed.err
    rows = {row["row"]: row for row in pq.read_table(disturbed / "tables" / "C.parquet").to_pylist()}
    assert (rows["GELU (ours)"]["runs"], rows["ReLU, aligned again"]["runs"]) == (1, 0)

    again = ablate(disturbed)
    assert again.status == 0, again.err
    assert results(disturbed) == results(undisturbed)
    assert (disturbed / "teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    ours = disturbed / "arms" / "ours-seed4"
    assert (ours / "rounds" / "01" / "alignment.parquet").stat().st_mtime_ns == aligned
    measured = json.loads((ours / "teacher" / "measured.json").read_text())
    assert set(measured) == {"latency"}, "the teacher is evaluated once for all runs"
    assert "ablation, free runs: 0 of 2 to do" in again.out
    assert "ablation, following runs: 1 of 2 to do" in again.out
    assert not (disturbed / "ray").exists()

    check_sparsity(disturbed)
    other = ablate(disturbed, "experiment.alignment.feature_weight=0.5")
    assert other.status == 2
    assert "holds another experiment: alignment.feature_weight: 1.0 -> 0.5" in other.err


def check_sparsity(output: Path) -> None:
    """The swapped model is a bundle of its own; its table says what sparsity.json says."""
    folder = output / "arms" / "relu-seed4"
    counted = json.loads((folder / "sparsity.json").read_text())
    assert load_bundle(folder / "rounds" / "01" / "model").config.backbone.activation == "relu"
    assert counted["guide"]["zeros"] < 0.01 < counted["swapped"]["zeros"]
    assert counted["swapped"]["zeros"] == pytest.approx(counted["swapped"]["negative"], abs=1e-3)
    rows = {row["row"]: row for row in pq.read_table(output / "tables" / "C.parquet").to_pylist()}
    shown = [rows[label]["zeros"] for label in ("GELU (ours)", "ReLU, after the swap", "ReLU, aligned again")]
    assert shown == [counted[name]["zeros"] for name in ("guide", "swapped", "aligned")]
    with pytest.raises(LedgerError, match="is made from another model than there is now: remove it"):
        relu_swap.is_swapped(Storage.at(str(folder)), "another result")
    assert {row["dtype"] for row in rows.values()} == {"float32"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tables", "A,H"), "error: --tables: 'H' is not one of A, B, C, D, E, F, F4, G"),
        (("--seeds", "0,x"), "error: --seeds 0,x: expected numbers separated by commas"),
        (("--seeds", "1,1"), "error: --seeds 1,1: expected different values, one at least"),
        (("--seeds", "2,-1"), "error: --seeds 2,-1: expected numbers from 0 on"),
        (("--full-rates", "1e-4,0"), "experiment.alignment.learning_rates.1: Input should be greater than 0"),
        (("--full-rates", ""), "error: --full-rates : expected numbers separated by commas"),
        (("scoring.drops=[1,2]",), "error: scoring.drops [1, 2]: an ablation chooses blocks by itself"),
    ],
)
def test_refused(
    arguments: tuple[str, ...], message: str, run_job: Callable[..., Any], tiny_recipe: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    found = run_job("ablate.py", tiny_recipe, "backend=local", "--output", str(output), *arguments)
    assert found.status == 2
    assert message in found.err
    assert len(found.err.splitlines()) == 1
    assert not output.exists()


def test_a_directory_of_something_else(run_job: Callable[..., Any], tiny_recipe: str, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    found = run_job("ablate.py", tiny_recipe, "--output", str(tmp_path))
    assert found.status == 2
    assert "has files (holiday.jpg) but no recipe.yaml" in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
