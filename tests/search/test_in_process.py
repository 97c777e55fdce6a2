"""The whole loop on real files and real pieces, in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pbd_ray.cluster.run import _publish, run_compression
from pbd_ray.compression.finetune import Diverged
from pbd_ray.config import load_recipe
from pbd_ray.data.source import VideoSource, load_split
from pbd_ray.search import in_process
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.state import AlignTask, Model

BLOCKS = 4


@pytest.fixture
def untrained(untrained_teacher: Path) -> list[str]:
    """Overrides of a run that trains nothing, not even its teacher."""
    return [f"experiment.teacher.source={untrained_teacher}", "experiment.alignment.trainable=none"]


@pytest.mark.parametrize("criterion", ["map", "train_loss", "mse"])
def test_every_criterion_selects_a_block(
    criterion: str, tiny_recipe: str, video_cache: Path, tmp_path: Path, untrained: list[str]
) -> None:
    """And without alignment nothing trains."""
    options = (f"experiment.scoring.criterion={criterion}", "stopping.max_drops=1")
    (record,) = _run(tiny_recipe, video_cache, tmp_path, *untrained, *options).rounds
    assert record.learning_rate is None
    assert record.curves is None or record.curves.num_rows == 0
    decision = record.decision
    assert decision is not None
    assert decision.criterion == criterion
    assert decision.dropped_block in range(BLOCKS)
    assert {score.block for score in decision.scores} - {-1} == set(range(BLOCKS))
    fit_videos = 6
    assert all(score.videos == fit_videos for score in decision.scores)
    if criterion != "map":  # lowest wins; the mAP of such a teacher is 0 for every candidate
        candidates = {score.block: score.score for score in decision.scores if score.block >= 0}
        assert decision.dropped_block == min(candidates, key=lambda block: (candidates[block], block))
        assert len(set(candidates.values())) == BLOCKS


def test_macs_fall_by_the_dropped_share(tiny_recipe: str, video_cache: Path, tmp_path: Path) -> None:
    summary = _run(tiny_recipe, video_cache, tmp_path)
    evaluations = [summary.teacher.evaluation, *(record.evaluation for record in summary.rounds)]
    macs = [evaluation.macs for evaluation in evaluations]
    assert macs[0] - macs[1] == macs[1] - macs[2] > 0
    blocks = [evaluation.block_macs for evaluation in evaluations]
    assert [share * BLOCKS for share in blocks] == [blocks[0] * left for left in (4, 3, 2)]
    assert macs[0] - macs[1] == blocks[0] - blocks[1]
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [entry["macs"] for entry in (written["teacher"], *written["rounds"])] == macs
    assert len(written["rounds"][-1]["kept_blocks"]) == BLOCKS - 2
    frontier = pq.read_table(tmp_path / "run" / "frontier.parquet")
    assert frontier.column("macs").to_pylist() == macs


def test_given_drops_are_not_scored(
    tiny_recipe: str, video_cache: Path, tmp_path: Path, untrained: list[str]
) -> None:
    summary = _run(tiny_recipe, video_cache, tmp_path, *untrained, "experiment.scoring.drops=[2,0]")
    assert [record.decision.dropped_block for record in summary.rounds if record.decision] == [2, 0]
    assert not list((tmp_path / "run").glob("rounds/*/scores"))


@pytest.mark.parametrize(
    ("fails", "model"), [((), "rounds/01/model"), ((1,), "rounds/02/model"), ((1, 3), "teacher")]
)
def test_the_last_model_that_stands_is_named(
    tmp_path: Path, make_world, capsys, fails: tuple[int, ...], model: str
) -> None:
    def spoilt(model, video: str, label: int) -> bool:
        return not set(fails) <= set(model.kept_blocks)

    rules = {"experiment__stopping": {"max_drops": 1, "tolerance": 0.99}}
    world = make_world(rules, spoilt=spoilt)
    summary = world.run(str(tmp_path))
    _publish(world.recipe, Ledger.existing(str(tmp_path)), summary)
    named = [line.split(f"{tmp_path}/")[-1] for line in capsys.readouterr().out.splitlines()]
    assert model in named


def test_a_grid_trains_on_the_device_that_scores(tiny_recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(tiny_recipe, ["device=cuda", "gpus_per_worker=1"])
    split, asked = load_split(recipe, print), []

    def no_gpu(job: object, device: torch.device) -> None:
        asked.append(device)
        raise Diverged("there is no GPU here")

    monkeypatch.setattr(in_process, "run_epochs", no_gpu)
    steps = in_process.in_process_steps(recipe, split, VideoSource("nowhere"), print)
    nothing = Model((0,), {})
    with pytest.raises(Diverged, match="no GPU"):
        steps.align(AlignTask(1, nothing, nothing, "parent"))
    assert set(asked) == {torch.device("cuda")}


def _run(recipe: str, cache: Path, folder: Path, *overrides: str):  # type: ignore[no-untyped-def]
    place = [f"run_dir={folder / 'run'}", f"cache_dir={cache}", "backend=local"]
    return run_compression(load_recipe(recipe, [*place, *overrides]))
