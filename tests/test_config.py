"""Recipes: what is shipped, what is refused and how, what the hash covers."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pbd_ray.config import (
    ConfigError,
    DataConfig,
    Execution,
    Experiment,
    Recipe,
    changed,
    differences,
    experiment_hash,
    load_recipe,
    shipped_recipes,
)

RECIPES = ("activitynet_videomae_s", "demo", "thumos14_videomae_l", "thumos14_videomae_s")
PUBLISHED = ("activitynet_videomae_s", "thumos14_videomae_l", "thumos14_videomae_s")


# A recipe of our own, so that the checks of overrides do not follow what the demo is tuned to.
SMALL = """
experiment:
  name: small
  seed: 0
  data: {source: synthetic, synthetic: {fit_videos: 96}}
  detector:
    grid: {window_frames: 128, feature_steps: 128, crop_pixels: 32}
    backbone: {embed_dim: 96, depth: 8, num_heads: 3, patch_pixels: 8}
    head: {levels: 5, regression_ranges: [[0, 4], [4, 8], [8, 16], [16, 32], [32, 10000]]}
  alignment:
    learning_rates: [1.0e-5, 1.0e-3]
    optimizer: {epochs: 3, schedule_epochs: 5}
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    return write(tmp_path / "small.yaml", SMALL)


def leaf(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- what is shipped


def test_shipped_recipes_are_these() -> None:
    assert shipped_recipes() == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipe_round_trips_through_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.experiment.name == name
    again = load_recipe(write(tmp_path / "copy.yaml", recipe.to_yaml()))
    assert again == recipe
    assert experiment_hash(again.experiment) == experiment_hash(recipe.experiment)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipe_shares_no_section(name: str) -> None:
    """A YAML alias would make an override of one section change the other one too."""
    changed = load_recipe(name, ["alignment.optimizer.clip_norm=7.5"])
    assert differences(load_recipe(name).experiment, changed.experiment) == (
        "alignment.optimizer.clip_norm: 1.0 -> 7.5",
    )


# Values of the paper, its supplement and its release (design, section 2). One row, one published fact.
THUMOS14 = {
    "experiment.paper_protocol": False,
    "experiment.data.class_agnostic": False,
    "experiment.data.selection_fraction": 0.1,
    "experiment.detector.grid.kind": "sliding",
    "experiment.detector.grid.window_frames": 768,
    "experiment.detector.grid.stride_frames": 4,
    "experiment.detector.grid.overlap": 0.5,
    "experiment.detector.grid.feature_steps": 768,
    "experiment.detector.grid.truncation_keep": 0.75,
    "experiment.detector.grid.truncation_tries": 200,
    "experiment.detector.grid.crop_ratio": (0.9, 1.0),
    "experiment.detector.head.channels": 512,
    "experiment.detector.head.position_table": False,
    "experiment.detector.head.label_smoothing": 0.0,
    "experiment.detector.head.boundary_weight": 1.0,
    "experiment.detector.head.normalizer_init": 100.0,
    "experiment.detector.postprocess.score_threshold": 0.001,
    "experiment.detector.postprocess.pre_nms_top": 2000,
    "experiment.detector.postprocess.min_score": 0.0,
    "experiment.detector.postprocess.per_class": True,
    "experiment.detector.postprocess.max_detections": 2000,
    "experiment.detector.postprocess.voting_iou": 0.0,
    "experiment.detector.postprocess.external_top_classes": 0,
    "experiment.scoring.map_tiou": 0.5,
    "experiment.alignment.optimizer.epochs": 60,
    "experiment.alignment.optimizer.head_lr": 1e-4,
    "experiment.alignment.optimizer.batch_size": 2,
    "experiment.evaluation.tious": (0.3, 0.4, 0.5, 0.6, 0.7),
    "experiment.evaluation.headline_tiou": 0.5,
    "experiment.evaluation.noninferiority_margin": 0.01,
}
VIDEOMAE_S = {
    "experiment.detector.backbone.embed_dim": 384,
    "experiment.detector.backbone.depth": 12,
    "experiment.detector.backbone.num_heads": 6,
    "experiment.alignment.rank": 96,
    "experiment.max_drops": 3,
}
VALUES: dict[str, dict[str, Any]] = {
    "thumos14_videomae_s": THUMOS14 | VIDEOMAE_S | {"experiment.alignment.optimizer.schedule_epochs": 65},
    "thumos14_videomae_l": THUMOS14
    | {
        "experiment.detector.backbone.embed_dim": 1024,
        "experiment.detector.backbone.depth": 24,
        "experiment.detector.backbone.num_heads": 16,
        "experiment.alignment.rank": 256,
        "experiment.alignment.optimizer.schedule_epochs": 80,
        "experiment.max_drops": 6,
    },
    "activitynet_videomae_s": VIDEOMAE_S
    | {
        "experiment.paper_protocol": False,
        "experiment.data.class_agnostic": True,
        "experiment.data.min_instance_fraction": 0.01,
        "experiment.detector.grid.kind": "resize",
        "experiment.detector.grid.window_frames": 768,
        "experiment.detector.grid.feature_steps": 192,
        "experiment.detector.head.channels": 256,
        "experiment.detector.head.position_table": True,
        "experiment.detector.head.label_smoothing": 0.1,
        "experiment.detector.head.boundary_weight": 2.0,
        "experiment.detector.head.normalizer_init": 200.0,
        "experiment.detector.postprocess.score_threshold": 0.0,
        "experiment.detector.postprocess.min_score": 0.001,
        "experiment.detector.postprocess.per_class": False,
        "experiment.detector.postprocess.max_detections": 100,
        "experiment.detector.postprocess.voting_iou": 0.9,
        "experiment.detector.postprocess.external_top_classes": 2,
        "experiment.scoring.map_tiou": "average",
        "experiment.alignment.optimizer.epochs": 8,
        "experiment.alignment.optimizer.schedule_epochs": 10,
        "experiment.alignment.later_epochs": 15,
        "experiment.alignment.optimizer.head_lr": 1e-3,
        "experiment.alignment.optimizer.batch_size": 16,
        "experiment.evaluation.tious": (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
        "experiment.evaluation.headline_tiou": "average",
        "experiment.evaluation.noninferiority_margin": 0.005,
        "experiment.stopping.guardrails.detad": "activitynet",
    },
}
COMMON = {
    "experiment.detector.grid.train_short_side_pixels": 182,
    "experiment.detector.grid.test_short_side_pixels": 160,
    "experiment.detector.grid.crop_pixels": 160,
    "experiment.detector.grid.augmentation": "full",
    "experiment.detector.backbone.mlp_ratio": 4.0,
    "experiment.detector.backbone.patch_pixels": 16,
    "experiment.detector.backbone.tubelet_frames": 2,
    "experiment.detector.backbone.chunk_frames": 16,
    "experiment.detector.backbone.position_table_pixels": 224,
    "experiment.detector.backbone.drop_path": 0.1,
    "experiment.detector.head.num_heads": 4,
    "experiment.detector.head.attention_window_steps": -1,
    "experiment.detector.head.embedding_layers": 2,
    "experiment.detector.head.stem_layers": 2,
    "experiment.detector.head.levels": 6,
    "experiment.detector.head.head_layers": 2,
    "experiment.detector.head.drop_path": 0.1,
    "experiment.detector.head.center_radius": 1.5,
    "experiment.detector.head.regression_ranges": (
        (0, 4),
        (4, 8),
        (8, 16),
        (16, 32),
        (32, 64),
        (64, 10000),
    ),
    "experiment.detector.head.normalizer_momentum": 0.9,
    "experiment.detector.head.class_prior": 0.01,
    "experiment.detector.postprocess.nms": "gaussian",
    "experiment.detector.postprocess.sigma": 0.7,
    "experiment.scoring.criterion": "map",
    "experiment.scoring.saturation": 0.98,
    "experiment.scoring.video_fraction": 1.0,
    "experiment.alignment.trainable": "lora",
    "experiment.alignment.learning_rates": (1e-5, 3.1623e-5, 1e-4, 3.1623e-4, 1e-3),
    "experiment.alignment.feature_loss": True,
    "experiment.alignment.prediction_loss": True,
    "experiment.alignment.temperature": 3.5,
    "experiment.alignment.boundary_loss": "diou",
    "experiment.alignment.feature_weight": 1.0,
    "experiment.alignment.class_weight": 1.0,
    "experiment.alignment.boundary_weight": 1.0,
    "experiment.alignment.optimizer.warmup_epochs": 5,
    "experiment.alignment.optimizer.weight_decay": 0.05,
    "experiment.alignment.optimizer.clip_norm": 1.0,
    "experiment.alignment.optimizer.ema_decay": 0.999,
    "experiment.alignment.optimizer.ema_warmup": False,
    "experiment.autocast": "float16",
    "experiment.alignment.optimizer.activation_checkpointing": True,
    "execution.device": "cuda",
    "execution.gpus_per_worker": 1,
    "execution.backend": "ray",
}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for name in PUBLISHED for key, value in (COMMON | VALUES[name]).items()],
)
def test_published_value(name: str, key: str, value: Any) -> None:
    assert leaf(load_recipe(name), key) == value


@pytest.mark.parametrize("name", PUBLISHED)
def test_lora_rank_is_a_quarter_of_the_width(name: str) -> None:
    experiment = load_recipe(name).experiment
    assert experiment.alignment.rank == experiment.detector.backbone.embed_dim // 4


def test_demo_needs_nothing_from_outside() -> None:
    recipe = load_recipe("demo")
    assert recipe.experiment.data.source == "synthetic"
    assert recipe.experiment.teacher.source == "shipped"
    assert (recipe.execution.device, recipe.execution.gpus_per_worker) == ("cpu", 0)
    assert recipe.execution.data_root is None
    assert recipe.execution.annotations is None


# --- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("experiment.alignment.optimizer.epochs=5", "experiment.alignment.optimizer.epochs", 5),
        ("alignment.optimizer.epochs=5", "experiment.alignment.optimizer.epochs", 5),
        ("seed=1", "experiment.seed", 1),
        ("run_dir=/data/run", "execution.run_dir", "/data/run"),
        ("run_dir=s3://bucket/a=b", "execution.run_dir", "s3://bucket/a=b"),
        ("run_dir=", "execution.run_dir", None),
        ("execution.backend=local", "execution.backend", "local"),
        ("backend=local", "execution.backend", "local"),
        ("alignment.learning_rates=[1e-4, 1e-3]", "experiment.alignment.learning_rates", (1e-4, 1e-3)),
        ("scoring.map_tiou=average", "experiment.scoring.map_tiou", "average"),
        ("scoring.map_tiou=0.7", "experiment.scoring.map_tiou", 0.7),
        ("stopping.max_drops=0", "experiment.max_drops", 0),
        ("stopping.max_drops=null", "experiment.max_drops", 2),
        ("stopping.tolerance=0.02", "experiment.stopping.tolerance", 0.02),
        ("stopping.tolerance=0", "experiment.stopping.judges", True),
        ("stopping.guardrails.max_class_loss=0.1", "experiment.stopping.judges", True),
        ("stopping.guardrails.max_false_negative_rise=0.1", "experiment.stopping.judges", True),
        ("stopping.guardrails.detad=activitynet", "experiment.stopping.judges", False),
    ],
)
def test_override(small: str, override: str, key: str, value: Any) -> None:
    assert leaf(load_recipe(small, [override]), key) == value


def test_later_override_wins(small: str) -> None:
    assert load_recipe(small, ["seed=1", "experiment.seed=2"]).experiment.seed == 2


def test_override_reaches_a_section_the_file_leaves_out(tmp_path: Path) -> None:
    path = write(tmp_path / "short.yaml", "experiment:\n  name: short\n  data: {}\n")
    recipe = load_recipe(path, ["detector.head.channels=32", "max_workers=5"])
    assert recipe.experiment.detector.head.channels == 32
    assert recipe.execution.max_workers == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed' is not of the form key=value"),
        ("run_dir=[1", "override 'run_dir=[1': '[1' is not a YAML value"),
        ("seed.x=1", "override 'seed.x=1': seed is a value, not a section"),
        ("sed=1", "unknown key 'experiment.sed'"),
        ("run_dri=/data", "unknown key 'experiment.run_dri'"),
        ("execution.run_dri=/data", "unknown key 'execution.run_dri'"),
        (
            "alignment.optimizer.epoch=3",
            "unknown key 'experiment.alignment.optimizer.epoch'",
        ),
        ("seed=x", "experiment.seed: Input should be a valid integer"),
        ("device=tpu", "execution.device: Input should be 'cpu' or 'cuda', got 'tpu'"),
        (
            "data.synthetic.fps=0",
            "experiment.data.synthetic.fps: Input should be greater than or equal",
        ),
        ("alignment.optimizer.head_lr=.nan", "experiment.alignment.optimizer.head_lr: Input should be"),
        ("alignment.learning_rates=[]", "experiment.alignment: learning_rates is empty"),
        (
            "alignment.learning_rates=[1e-4, 1e-4]",
            "experiment.alignment: learning_rates has a value twice",
        ),
        ("alignment.rounds=first", "experiment.alignment.rounds: Input should be 'every' or 'last', got"),
        ("stopping.max_drops=8", "experiment: stopping.max_drops 8 must leave a block of 8"),
        ("stopping.runner_ups=-1", "experiment.stopping.runner_ups: Input should be greater than or equal"),
        (
            "stopping.guardrails.max_class_loss=0",
            "experiment.stopping.guardrails.max_class_loss: Input should be greater than 0, got 0",
        ),
        ("detector.grid.crop_pixels=33", "grid.crop_pixels 33 is not a multiple of backbone.patch_pixels 8"),
        ("detector.grid.window_frames=100", "grid.window_frames 100 is not a multiple"),
        (
            "detector.grid.feature_steps=100",
            "grid.feature_steps 100 is not a multiple of the coarsest stride 16",
        ),
        ("detector.head.levels=4", "regression_ranges has 5 entries for 4 levels"),
        ("detector.backbone.num_heads=5", "embed_dim 96 is not a multiple of num_heads 5"),
        ("detector.backbone.tubelet_frames=3", "chunk_frames 16 is not a multiple of tubelet_frames 3"),
        ("detector.backbone.position_table_pixels=36", "position_table_pixels 36 is not a multiple of"),
        ("detector.head.num_heads=7", "head: channels 512 is not a multiple of num_heads 7"),
        ("detector.grid.crop_ratio=[1.0,0.9]", "crop_ratio [1.0, 0.9] must ascend"),
        ("detector.postprocess.external_top_classes=-1", "Input should be greater than or equal to 0"),
        ("alignment.optimizer.epochs=9", "schedule_epochs 5 is shorter than epochs 9"),
        ("data.source=files", "data.synthetic goes with data.source=synthetic, and only with it"),
        ("gpus_per_worker=1", "execution.gpus_per_worker is set but execution.device is cpu"),
        ("device=cuda", "execution.device is cuda but execution.gpus_per_worker is 0"),
        ("candidate_batch=2", "execution.candidate_batch 2 must be 1 where execution.device is cpu"),
        ("candidate_batch=0", "execution.candidate_batch: Input should be greater than or equal to 1"),
    ],
)
def test_refused_override_says_what_and_where(small: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(small, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment: [", "not valid YAML"),
        ("- 1\n", "expected a mapping with 'experiment' and 'execution'"),
        ("", "expected a mapping with 'experiment' and 'execution'"),
        ("execution: {}\n", "experiment: Field required"),
        ("experiment: {name: a}\n", "experiment.data: Field required"),
        ("experiment: {name: a, data: {}}\nexecutions: {}\n", "unknown key 'executions'"),
        (
            "experiment: {name: a, data: {}, detector: {head: {chanels: 3}}}\n",
            "unknown key 'experiment.detector.head.chanels'",
        ),
        (
            "experiment: {name: a, data: {source: synthetic, synthetic: {sead: 1}}}\n",
            "unknown key 'experiment.data.synthetic.sead'",
        ),
    ],
)
def test_refused_file_is_named_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["thumos15", "no/such.yaml", "."])
def test_unknown_recipe_lists_the_shipped_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a file nor one of: activitynet_videomae_s, demo, "):
        load_recipe(name)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [(8, 10), (15, 17), (15, 17)]),  # three drops: the paper's ActivityNet
        (["stopping.max_drops=4"], [(8, 10), (8, 10), (15, 17), (15, 17)]),
        (["alignment.later_epochs=null"], [(8, 10), (8, 10), (8, 10)]),
    ],
)
def test_later_rounds_train_longer(overrides: list[str], expected: list[tuple[int, int]]) -> None:
    experiment = load_recipe("activitynet_videomae_s", overrides).experiment
    found = [experiment.alignment_after(drops).optimizer for drops in range(1, experiment.max_drops + 1)]
    assert [(each.epochs, each.schedule_epochs) for each in found] == expected


def test_sections_are_frozen(small: str) -> None:
    recipe = load_recipe(small)
    with pytest.raises(ValueError, match="frozen"):
        recipe.experiment.seed = 1


# --- hash and differences


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return value


def test_hash_does_not_depend_on_how_the_recipe_is_written(small: str, tmp_path: Path) -> None:
    recipe = load_recipe(small)
    raw = yaml.safe_load(recipe.to_yaml())
    backwards = write(tmp_path / "a.yaml", yaml.safe_dump(reversed_keys(raw), sort_keys=False))
    as_json = write(tmp_path / "b.yaml", json.dumps(raw))
    expected = experiment_hash(recipe.experiment)
    assert experiment_hash(load_recipe(backwards).experiment) == expected
    assert experiment_hash(load_recipe(as_json).experiment) == expected
    assert experiment_hash(load_recipe(small, ["alignment.temperature=3.50"]).experiment) == expected


def test_hash_is_the_same_in_another_process(small: str) -> None:
    program = (
        "import sys, pbd_ray.config as c; print(c.experiment_hash(c.load_recipe(sys.argv[1]).experiment))"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program, small],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert hashes == {experiment_hash(load_recipe(small).experiment)}


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("run_dir=/elsewhere", True),
        ("max_workers=64", True),
        ("backend=local", True),
        ("threads_per_worker=4", True),
        ("cpus_per_worker=3", True),
        ("seed=1", False),
        ("name=other", False),
        ("alignment.feature_weight=0.5", False),
        ("data.selection_fraction=0.2", False),
        ("detector.postprocess.sigma=0.5", False),
        ("paper_protocol=true", False),
    ],
)
def test_hash_covers_the_experiment_and_nothing_else(small: str, override: str, same: bool) -> None:
    ours, theirs = load_recipe(small).experiment, load_recipe(small, [override]).experiment
    assert (experiment_hash(ours) == experiment_hash(theirs)) is same
    assert (differences(ours, theirs) == ()) is same


def test_differences_are_sorted_lines(small: str) -> None:
    ours = load_recipe(small).experiment
    theirs = load_recipe(small, ["seed=4", "alignment.learning_rates=[0.5]", "data.classes=[a]"]).experiment
    assert differences(ours, theirs) == (
        "alignment.learning_rates: [1e-05, 0.001] -> [0.5]",
        "data.classes: None -> ['a']",
        "seed: 0 -> 4",
    )


def test_differences_see_a_section_on_one_side(small: str) -> None:
    ours = Experiment(name="a", data=DataConfig())
    theirs = load_recipe(small).experiment.model_copy(update={"name": "a"})
    assert "data.synthetic.fit_videos: None -> 96" in differences(ours, theirs)


def test_max_drops_is_a_quarter_of_the_depth(small: str) -> None:
    for depth, drops in ((4, 1), (8, 2), (12, 3), (24, 6), (3, 0)):
        raw = copy.deepcopy(load_recipe(small).experiment.model_dump())
        raw["detector"]["backbone"]["depth"] = depth
        assert Experiment.model_validate(raw).max_drops == drops


@pytest.mark.parametrize(
    ("device", "cpus", "threads", "decoding"),
    [
        ("cpu", 1, 1, 0),
        ("cpu", 0.66, 1, 0),
        ("cpu", 2, 1, 1),
        ("cpu", 2.5, 1, 1),
        ("cpu", 8, 5, 3),
        ("cpu", 2, 4, 0),
        ("cuda", 1, 1, 1),
        ("cuda", 7, 7, 1),
        ("cuda", 7, 4, 3),
    ],
)
def test_decoding_threads_are_what_torch_leaves(
    device: str, cpus: float, threads: int, decoding: int
) -> None:
    execution = Execution.model_validate(
        {"device": device, "cpus_per_worker": cpus, "threads_per_worker": threads}
    )
    assert execution.decoding_threads == decoding


def test_changed_is_an_override_of_a_value(small: str) -> None:
    recipe = load_recipe(small, ["scoring.racing=off", "alignment.halving={first_epochs: 1}"])
    changes = {"alignment.trainable": "full", "scoring.drops": [1, 0], "run_dir": "/elsewhere"}
    overrides = ["alignment.trainable=full", "scoring.drops=[1,0]", "run_dir=/elsewhere"]
    expected = load_recipe(small, ["scoring.racing=off", "alignment.halving={first_epochs: 1}", *overrides])
    assert changed(recipe, {}) == recipe
    assert changed(recipe, changes) == expected != recipe
    with pytest.raises(ConfigError, match=r"unknown key 'experiment\.alignment\.trainables'"):
        changed(recipe, {"alignment.trainables": "full"})


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("target_macs_ratio", "needs stopping.target_macs_ratio to be null, got 0.5"),
        ("target_latency_ratio", "needs stopping.target_latency_ratio to be null, got 0.5"),
        ("tolerance", "needs stopping.tolerance and .guardrails to be null"),
        ("guardrails.max_class_loss", "needs stopping.tolerance and .guardrails to be null"),
    ],
)
def test_one_alignment_at_the_end_needs_a_known_end(small: str, rule: str, problem: str) -> None:
    assert load_recipe(small, ["alignment.rounds=last"]).experiment.alignment.rounds == "last"
    with pytest.raises(ConfigError, match=rf"alignment\.rounds last {problem}"):
        load_recipe(small, ["alignment.rounds=last", f"stopping.{rule}=0.5"])


def test_candidates_share_a_batch_on_gpus(small: str) -> None:
    recipe = load_recipe(small, ["device=cuda", "gpus_per_worker=1", "candidate_batch=6"])
    assert recipe.execution.candidate_batch == 6
