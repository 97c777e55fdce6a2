from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pbd_ray.data.quarantine import NOTHING, Quarantine
from pbd_ray.search.commit import COMMIT_KEYS
from pbd_ray.search.environment import Environment, current_environment
from pbd_ray.search.hashing import bytes_hash, table_hash
from pbd_ray.search.ledger import Ledger, LedgerError, quarantine_hash
from pbd_ray.search.state import Slice, Work
from pbd_ray.search.verify import verify

COMMIT_OF_LISTS = json.dumps({key: [] for key in sorted(COMMIT_KEYS)})


def environment(**changes: Any) -> Environment:
    facts: dict[str, Any] = {
        "versions": {"torch": "2.14", "numpy": "2.4"},
        "python": "3.11",
        "platform": "Linux",
        "cpu": "one",
        "source_hash": "s" * 64,
        "data_hash": "d" * 64,
        "teacher_hash": "t" * 64,
        "quarantine_hash": quarantine_hash(None),
        "device": "cpu",
        "threads_per_worker": 1,
        "train_workers": 1,
        "window_batch": 4,
        "candidate_batch": 1,
    }
    return Environment(**(facts | changes))


def test_begin_and_go_on(tmp_path: Path, make_recipe) -> None:
    run_dir = tmp_path / "a" / "run"
    Ledger.open(str(run_dir), make_recipe())
    assert (run_dir / "recipe.yaml").is_file()
    elsewhere = make_recipe(execution__max_workers=7)
    ledger = Ledger.open(str(run_dir), elsewhere)
    assert ledger.recipe() == elsewhere
    assert Ledger.existing(str(run_dir)).recipe() == elsewhere
    assert ledger.committed() == ()
    assert ledger.scratch_uri() == str(run_dir / "ray")


def test_another_experiment_is_refused(tmp_path: Path, make_recipe) -> None:
    Ledger.open(str(tmp_path), make_recipe())
    before = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(LedgerError) as error:
        Ledger.open(str(tmp_path), make_recipe(experiment__seed=5, experiment__scoring={"criterion": "mse"}))
    assert str(error.value) == (
        f"{tmp_path}/recipe.yaml holds another experiment: scoring.criterion: map -> mse; seed: 0 -> 5"
    )
    assert (tmp_path / "recipe.yaml").read_bytes() == before


def test_many_differences_are_cut_short(tmp_path: Path, make_recipe) -> None:
    Ledger.open(str(tmp_path), make_recipe())
    other = make_recipe(
        experiment__seed=5,
        experiment__name="x",
        experiment__paper_protocol=True,
        experiment__scoring={"criterion": "mse"},
    )
    with pytest.raises(LedgerError, match=r"and 1 more$"):
        Ledger.open(str(tmp_path), other)


def test_foreign_files_are_refused(tmp_path: Path, make_recipe) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LedgerError, match=r"has files \(thesis.tex\) but no recipe.yaml"):
        Ledger.open(str(tmp_path), make_recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(LedgerError, match="not a run directory"):
        Ledger.existing(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("a: 1", "Field required"),
        ("[]", "recipe: Input should be"),
    ],
)
def test_broken_recipe_is_one_line(tmp_path: Path, make_recipe, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(LedgerError, match=message) as error:
        Ledger.open(str(tmp_path), make_recipe())
    assert "\n" not in str(error.value)
    assert str(tmp_path / "recipe.yaml") in str(error.value)


def test_leftovers_of_a_killed_start(tmp_path: Path, make_recipe) -> None:
    (tmp_path / "rounds" / "01").mkdir(parents=True)
    (tmp_path / "recipe.yaml.tmp-1").write_text("half")
    (tmp_path / "rounds" / "01" / "decision.json.tmp-1").write_text("half")
    Ledger.open(str(tmp_path), make_recipe())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["recipe.yaml"]


def test_environment(tmp_path: Path, make_recipe) -> None:
    ledger = Ledger.open(str(tmp_path), make_recipe())
    assert ledger.record_environment(environment()) == ()
    assert ledger.record_environment(environment(platform="Darwin")) == ()
    changed = environment(cpu="two", versions={"torch": "2.15", "ray": "2.60"})
    lines = (
        "cpu: one -> two",
        "versions.numpy: 2.4 -> None",
        "versions.ray: None -> 2.60",
        "versions.torch: 2.14 -> 2.15",
    )
    for _ in range(2):
        assert ledger.record_environment(changed) == lines
    stored = ledger.environment()
    assert stored == {"first": environment().to_json(), "changes": [list(lines)]}


@pytest.mark.parametrize(
    ("key", "what"), [("data_hash", "annotations"), ("teacher_hash", "teacher's weights")]
)
def test_other_inputs_are_refused(tmp_path: Path, make_recipe, key: str, what: str) -> None:
    ledger = Ledger.open(str(tmp_path), make_recipe())
    ledger.record_environment(environment())
    with pytest.raises(LedgerError, match=f"the {what} are not those the run began with"):
        ledger.record_environment(environment(**{key: "x" * 64}))


def test_current_environment(make_recipe) -> None:
    execution = make_recipe(execution__threads_per_worker=3).execution
    now = current_environment(execution, "data", "teacher", "quarantine")
    assert now == current_environment(execution, "data", "teacher", "quarantine")
    assert now.threads_per_worker == 3
    assert {"torch", "numpy", "pyarrow"} <= set(now.versions)
    assert now.cpu
    assert len(now.source_hash) == 64
    json.dumps(now.to_json())


@pytest.fixture
def finished(tmp_path: Path, make_world) -> Path:
    make_world().run(str(tmp_path / "run"))
    return tmp_path / "run"


def test_layout(finished: Path) -> None:
    found = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    sweep = {"plan.json", *(f"{index:04d}.parquet" for index in range(4))}
    evaluated = {"evaluation.json", "measured.json", "commit.json", *(f"evaluation/{name}" for name in sweep)}
    aligned = {"model/config.json", "model/model.safetensors", "alignment.parquet"}
    decided = {"scores.parquet", "decision.json", *(f"scores/{name}" for name in sweep)}
    expected = {"recipe.yaml", "environment.json", "videos.parquet", "summary.json"}
    expected |= {f"teacher/{name}" for name in evaluated | {"config.json", "model.safetensors"}}
    expected |= {f"rounds/{n:02d}/{name}" for n in (1, 2) for name in evaluated | aligned | decided}
    assert found == expected


def test_a_finished_run_verifies(finished: Path) -> None:
    assert verify(str(finished)) == []


@pytest.mark.parametrize(
    "name",
    [
        "teacher/model.safetensors",
        "teacher/evaluation/0000.parquet",
        "rounds/01/scores.parquet",
        "rounds/01/decision.json",
        "rounds/01/model/model.safetensors",
        "rounds/02/measured.json",
        "rounds/02/scores/plan.json",
    ],
)
def test_verify_finds_a_flipped_bit_and_a_missing_file(finished: Path, name: str) -> None:
    path = finished / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert verify(str(finished)) == [f"{name}: bytes differ from the commit"]
    path.unlink()
    assert verify(str(finished)) == [f"{name}: missing"]


def test_verify_finds_a_foreign_file(finished: Path) -> None:
    (finished / "rounds/01/notes.txt").write_text("hello")
    assert verify(str(finished)) == ["rounds/01/notes.txt: not in the commit"]


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_verify_finds_a_broken_chain(finished: Path) -> None:
    change_json(finished / "rounds/01/commit.json", parent="0" * 64)
    assert verify(str(finished)) == [
        "rounds/01/commit.json: parent is not the result of round 0",
        "rounds/01/commit.json: result is not the hash of its parts",
    ]


def test_verify_finds_a_changed_result(finished: Path) -> None:
    change_json(finished / "rounds/01/commit.json", result="0" * 64)
    assert verify(str(finished)) == [
        "rounds/01/commit.json: result is not the hash of its parts",
        "rounds/02/commit.json: parent is not the result of round 1",
    ]


def test_verify_finds_a_changed_recipe(finished: Path) -> None:
    text = (finished / "recipe.yaml").read_text()
    (finished / "recipe.yaml").write_text(text.replace("name: tiny", "name: other"))
    assert verify(str(finished)) == [
        "teacher/commit.json: parent is not this experiment (recipe.yaml) on its data (environment.json)"
    ]


def test_verify_finds_a_missing_round(finished: Path) -> None:
    (finished / "rounds/01/commit.json").unlink()
    assert verify(str(finished)) == [
        "rounds/01/commit.json: missing",
        "rounds/02/commit.json: parent is not the result of round 1",
    ]


@pytest.mark.parametrize("text", ["{", "[]", "{}", COMMIT_OF_LISTS])
def test_verify_finds_a_broken_commit(finished: Path, text: str) -> None:
    (finished / "rounds/02/commit.json").write_text(text)
    assert verify(str(finished)) == ["rounds/02/commit.json: not a commit"]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("environment.json", "{", "not valid JSON"),
        ("environment.json", "[]", "not an environment"),
        ("environment.json", "{}", "not an environment"),
        ("recipe.yaml", "a: [", "not valid YAML"),
    ],
)
def test_verify_finds_a_broken_root(finished: Path, name: str, text: str, problem: str) -> None:
    (finished / name).write_text(text)
    (found,) = verify(str(finished))
    assert found.startswith(f"{finished}/{name}: {problem}")


def test_verify_finds_content_at_odds_with_the_result(finished: Path) -> None:
    """Somebody edits a decision and makes the byte hash fit."""
    decision, commit = finished / "rounds/02/decision.json", finished / "rounds/02/commit.json"
    change_json(decision, dropped_block=0)
    files = json.loads(commit.read_text())["files"]
    change_json(commit, files=files | {"decision.json": bytes_hash(decision.read_bytes())})
    assert verify(str(finished)) == ["rounds/02: decision is not what the commit says"]


def test_the_open_round_is_no_problem(finished: Path) -> None:
    (finished / "rounds/02/commit.json").unlink()
    assert verify(str(finished)) == []
    assert len(Ledger.existing(str(finished)).committed()) == 2


def test_verify_wants_a_run(tmp_path: Path, make_recipe) -> None:
    with pytest.raises(LedgerError, match="not a run directory"):
        verify(str(tmp_path))
    Ledger.open(str(tmp_path), make_recipe())
    assert verify(str(tmp_path)) == ["environment.json: missing"]


def test_committed_rounds_are_immutable(finished: Path) -> None:
    ledger = Ledger.existing(str(finished))
    folder = ledger.round(1)
    decision = folder.read_decision()
    assert decision is not None
    writes = [
        lambda: folder.write_decision(decision),
        lambda: folder.write_measured({}),
        lambda: folder.write_bundle({"config.json": b"", "model.safetensors": b""}),
        lambda: folder.write_slice("scores", Work(Slice(9, ()), ()), folder.read_slices("scores")),
        lambda: ledger.commit(1, "w"),
        lambda: ledger.teacher.write_measured({}),
    ]
    for write in writes:
        with pytest.raises(LedgerError, match="is committed"):
            write()
    assert verify(str(finished)) == []


def test_a_commit_needs_its_parent(finished: Path) -> None:
    with pytest.raises(LedgerError, match=r"rounds/03 is not committed"):
        Ledger.existing(str(finished)).commit(4, "w")


def test_a_round_with_another_parent_stops_the_run(finished: Path, make_recipe) -> None:
    change_json(finished / "rounds/01/commit.json", parent="0" * 64)
    with pytest.raises(LedgerError, match=r"rounds/01/commit.json: parent is not the result of round 0"):
        Ledger.open(str(finished), make_recipe()).committed()


def test_records_come_back(finished: Path) -> None:
    teacher, first, second = Ledger.existing(str(finished)).committed()
    assert (teacher.round, teacher.decision, teacher.learning_rate, teacher.curves) == (0, None, None, None)
    assert second.parent == first.result
    assert first.parent == teacher.result
    assert (first.learning_rate, first.epoch) == (1e-4, 2)
    assert first.curves is not None
    assert first.curves.column_names == ["learning_rate", "epoch", "loss"]
    assert first.curves.schema.metadata is None
    assert first.evaluation.interval is not None
    assert first.evaluation.kept_blocks == first.decision.kept_blocks
    assert list(first.evaluation.map) == [0.3, 0.4, 0.5, 0.6, 0.7]


def test_rows_do_not_show_the_slices(tmp_path: Path, make_world) -> None:
    hashes, orders = set(), set()
    for workers in (1, 3):
        world = make_world({"execution__max_workers": workers})
        world.run(str(tmp_path / str(workers)))
        rows = Ledger.existing(str(tmp_path / str(workers))).round(1).read_slices("scores")
        hashes.add(table_hash(rows))
        orders.add(str(rows.to_pylist()))
    assert len(hashes) == len(orders) == 1


LEFT_OUT = Quarantine({"fit_00": "/v/fit_00.mp4: gone"}, {"fit": 0.125, "selection": 0.0, "test": 0.0})


def test_quarantine_is_written_once(tmp_path: Path, make_recipe) -> None:
    ledger = Ledger.open(str(tmp_path), make_recipe())
    assert ledger.quarantine() is None
    ledger.record_quarantine(LEFT_OUT)
    before = (tmp_path / "quarantine.json").stat().st_mtime_ns
    ledger.record_quarantine(NOTHING)
    assert ledger.quarantine() == LEFT_OUT
    assert (tmp_path / "quarantine.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "not the one the run began with"),
        ('{"videos": {}, "shares": {}}', "not the one the run began with"),
        ('{"videos": {}}', "not a quarantine: expected an object of 'videos' and 'shares'"),
        ("{", "not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_quarantine_that_was_changed(tmp_path: Path, make_world, content: str | None, problem: str) -> None:
    """`--verify` and the next start say the same."""
    world, record = make_world({"experiment__stopping__max_drops": 0}), tmp_path / "quarantine.json"
    Ledger.open(str(tmp_path), world.recipe).record_quarantine(LEFT_OUT)
    world.run(str(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["quarantined"] == dict(LEFT_OUT.reasons)
    assert verify(str(tmp_path)) == []
    if content is None:
        record.unlink()
    else:
        record.write_text(content)
    assert verify(str(tmp_path)) == [f"{record}: {problem}"]
    with pytest.raises(LedgerError) as error:
        world.run(str(tmp_path))
    assert str(error.value) == f"{record}: {problem}"
