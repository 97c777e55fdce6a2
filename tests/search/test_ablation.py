"""Which runs the supplement's tables are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import pytest

from pbd_ray.config import ConfigError, Recipe, differences, load_recipe
from pbd_ray.search.ablation import (
    OURS,
    RANDOM_SETS,
    Arm,
    Run,
    ablation_recipe,
    fixed_set,
    one_shot,
    random_sets,
    run_recipe,
)
from pbd_ray.search.ablation_tables import TABLES, Row, TablePlan, plan_tables, runs_of


@pytest.fixture
def make_base(tiny_recipe: str) -> Callable[..., Recipe]:
    def make(*overrides: str) -> Recipe:
        return ablation_recipe(load_recipe(tiny_recipe, overrides))

    return make


@pytest.fixture
def base(make_base: Callable[..., Recipe]) -> Recipe:
    return make_base()


def names(tables: Sequence[TablePlan]) -> list[str]:
    return [run.name for run in runs_of(tables)]


@pytest.mark.parametrize(
    ("letter", "expected"),
    [
        ("A", set()),
        ("B", {f"one-shot-{a}-{b}" for a, b in [(1, 2), (0, 2)]}),
        ("C", {"relu"}),
        ("D", {"criterion-train-loss", "criterion-mse"}),
        ("E", {"none-same-order", "none-greedy"}),
        ("F", {"full"}),
        ("F4", {"lora-only"}),
        ("G", {"feature-only", "prediction-only", "no-alignment-losses"}),
    ],
)
def test_runs_of_a_table(letter: str, expected: set[str], base: Recipe) -> None:
    tables = plan_tables(base, [letter], [0, 3])
    if letter == "B":
        for seed in (0, 3):
            sets = random_sets(seed, 4, 2)
            expected |= {f"one-shot-{a}-{b}" for a, b in sets}
            assert {f"one-shot-{a}-{b}-seed{seed}" for a, b in sets} <= set(names(tables))
        assert {name.rpartition("-")[0] for name in names(tables)} == {"ours"} | expected
        return
    assert set(names(tables)) == {f"{arm}-seed{seed}" for arm in {"ours"} | expected for seed in (0, 3)}


def test_ours_is_first_and_those_that_follow_it_are_last(base: Recipe) -> None:
    runs = runs_of(plan_tables(base, list(TABLES), [0, 1, 2]))
    assert len(set(runs)) == len(runs)
    assert [run.name for run in runs[:3]] == ["ours-seed0", "ours-seed1", "ours-seed2"]
    kinds = [run.arm.kind == "free" for run in runs]
    assert kinds == sorted(kinds, reverse=True)
    following = {run.arm.name for run in runs if run.arm.kind != "free"}
    alignments = {"full", "lora-only", "feature-only", "prediction-only", "no-alignment-losses"}
    assert following == {"relu", "none-same-order"} | alignments


def changed_by(base: Recipe, arm: Arm, order: Sequence[int] | None = None) -> dict[str, str]:
    """Key -> new value of all that a run with seed 5 has otherwise than the ablation's recipe."""
    recipe = run_recipe(base, Run(arm, 5), "/runs/x", order)
    assert (recipe.run_dir, recipe.execution.backend) == ("/runs/x", "local")
    lines = differences(base.experiment, recipe.experiment)
    return {line.partition(": ")[0]: line.rpartition(" -> ")[2] for line in lines}


def test_one_shot_differs_in_nothing_but_when_it_aligns(base: Recipe) -> None:
    """The same total epochs (2 rounds of 2), the same grid, the same losses."""
    ours, once = changed_by(base, OURS), changed_by(base, one_shot(base, (3, 1)))
    assert ours == {"seed": "5", "name": "tiny-ours"}
    assert once == {
        "seed": "5",
        "name": "tiny-one-shot-3-1",
        "scoring.drops": "[3, 1]",
        "alignment.rounds": "last",
        "alignment.optimizer.epochs": "4",
        "alignment.optimizer.schedule_epochs": "4",
    }


def test_one_shot_trains_as_long_as_our_rounds_together(make_base: Callable[..., Recipe]) -> None:
    """2 epochs, then 3 in the second half of the rounds."""
    base = make_base("alignment.later_epochs=3")
    once = run_recipe(base, Run(one_shot(base, (3, 1)), 0), "/x", None).experiment
    assert once.alignment_after(2).optimizer.epochs == 5


@pytest.mark.parametrize(
    ("letter", "label", "expected"),
    [
        ("E", "not, 2 dropped, same order", {"alignment.trainable": "none", "scoring.drops": "[2, 0]"}),
        ("E", "not, 2 dropped, selected anew", {"alignment.trainable": "none"}),
        ("D", "mse", {"scoring.criterion": "mse"}),
        (
            "F",
            "full",
            {
                "alignment.trainable": "full",
                "alignment.learning_rates": "[1e-05, 0.0001]",
                "scoring.drops": "[2, 0]",
            },
        ),
        ("F4", "LoRA only", {"alignment.trainable": "lora_only", "scoring.drops": "[2, 0]"}),
        ("G", "feature", {"alignment.prediction_loss": "False", "scoring.drops": "[2, 0]"}),
        ("C", "ReLU, aligned again", {"detector.backbone.activation": "relu"}),
    ],
)
def test_what_an_arm_changes(letter: str, label: str, expected: dict[str, str], base: Recipe) -> None:
    (table,) = plan_tables(base, [letter], [5])
    ((arm,),) = row(table, label).arms
    assert changed_by(base, arm, (2, 0)) == expected | {"seed": "5", "name": f"tiny-{arm.name}"}


def row(table: TablePlan, label: str) -> Row:
    (found,) = (row for row in table.rows if row.label == label)
    return found


def test_full_rates_may_be_given(base: Recipe) -> None:
    (table,) = plan_tables(base, ["F"], [0], [3e-5])
    ((arm,),) = row(table, "full").arms
    assert run_recipe(base, Run(arm, 0), "/x", (1, 2)).experiment.alignment.learning_rates == (3e-5,)


@pytest.mark.parametrize(
    ("override", "letter", "label"),
    [
        ("scoring.criterion=mse", "D", "mse"),
        ("alignment.trainable=full", "F", "full"),
        ("alignment.feature_loss=false", "G", "prediction"),
    ],
)
def test_what_the_recipe_does_by_itself_is_ours(
    override: str, letter: str, label: str, make_base: Callable[..., Recipe]
) -> None:
    base = make_base(override, "alignment.learning_rates=[1e-3]")
    (table,) = plan_tables(base, [letter], [0], [1e-3])
    assert row(table, label).arms == ((OURS,),)


def test_rows_are_compared_with_a_row_of_their_table(base: Recipe) -> None:
    for table in plan_tables(base, list(TABLES), [0]):
        labels = [row.label for row in table.rows]
        assert len(set(labels)) == len(labels)
        assert {row.against for row in table.rows} - {None} <= set(labels)
        assert all(row.against for row in table.rows if row.expected)


def test_expected_orderings(base: Recipe) -> None:
    """(better, worse) of every table."""
    found = {
        (table.letter, row.against, row.label)
        for table in plan_tables(base, list(TABLES), [0])
        for row in table.rows
        if row.expected == "above"
    }
    assert found == {
        ("B", "progressive (ours)", "one-shot, 5 random sets a seed"),
        ("D", "map", "train_loss"),
        ("D", "map", "mse"),
        ("E", "fine-tuned, 1 dropped", "not, 1 dropped, same order"),
        ("E", "fine-tuned, 1 dropped", "not, 1 dropped, selected anew"),
        ("E", "fine-tuned, 2 dropped", "not, 2 dropped, same order"),
        ("E", "fine-tuned, 2 dropped", "not, 2 dropped, selected anew"),
        ("F4", "LoRA and head", "LoRA only"),
        ("G", "feature and prediction", "none"),
    }


@pytest.mark.parametrize(
    ("paper", "depth", "drops", "expected"),
    [
        ((2, 5, 9), 12, 3, (2, 5, 9)),
        ((0, 4, 7), 12, 3, (0, 4, 7)),
        ((2, 5, 9), 24, 3, (4, 10, 19)),
        ((2, 5, 9), 24, 6, (4, 7, 9, 12, 15, 19)),
        ((2, 5, 9), 8, 2, (1, 6)),
        ((0, 4, 7), 8, 2, (0, 4)),
        ((2, 5, 9), 12, 1, (5,)),
        ((0, 4, 7), 4, 3, (0, 1, 2)),
        ((2, 5, 9), 4, 3, (1, 2, 3)),
    ],
)
def test_fixed_sets(paper: tuple[int, ...], depth: int, drops: int, expected: tuple[int, ...]) -> None:
    assert fixed_set(paper, depth, drops) == expected


@pytest.mark.parametrize(("depth", "drops"), [(8, 2), (12, 3), (24, 6), (4, 2)])
def test_random_sets(depth: int, drops: int) -> None:
    sets = random_sets(3, depth, drops)
    assert len(set(sets)) == RANDOM_SETS
    assert all(list(blocks) == sorted(set(blocks)) and len(blocks) == drops for blocks in sets)
    assert all(0 <= block < depth for blocks in sets for block in blocks)
    assert random_sets(3, depth, drops) == sets != random_sets(4, depth, drops)


def test_random_sets_where_there_are_few() -> None:
    assert set(random_sets(0, 4, 1)) == set(combinations(range(4), 1))


def test_no_arm_may_stop_before_another(make_base: Callable[..., Recipe]) -> None:
    stopping = make_base("stopping.max_drops=null", "stopping.tolerance=0.1").experiment.stopping
    assert (stopping.max_drops, stopping.tolerance) == (1, None)  # a quarter of 4 blocks


def test_all_seeds_share_one_split(base: Recipe) -> None:
    """They start from one teacher: videos that it was fitted on must choose nothing with any seed."""
    assert base.experiment.data.split_seed == base.experiment.seed == 0
    runs = [run_recipe(base, Run(OURS, seed), "dir", None).experiment for seed in (0, 3)]
    assert [(one.seed, one.data.split_seed) for one in runs] == [(0, 0), (3, 0)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scoring.drops=[1,2]", r"scoring.drops \[1, 2\]: an ablation chooses blocks by itself"),
        ("alignment.rounds=last", "alignment.rounds last: an ablation"),
        ("stopping.max_drops=0", "stopping.max_drops 0: an ablation needs a block"),
        ("alignment.trainable=none", "alignment.trainable none: an ablation compares ways to align"),
        ("detector.backbone.activation=relu", "activation relu: an ablation swaps a GELU for it"),
    ],
)
def test_refused_recipes(override: str, message: str, make_base: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match=message):
        make_base(override)


@pytest.mark.parametrize(
    ("tables", "seeds", "message"),
    [
        (["H"], [0], "--tables: 'H' is not one of A, B, C, D, E, F, F4, G"),
        (["A", "A"], [0], "--tables A,A: expected different values"),
        (["A"], [], "--seeds : expected different values, one at least"),
        (["A"], [1, 1], "--seeds 1,1: expected different"),
        (["A"], [0, -1], "--seeds 0,-1: expected numbers from 0 on"),
    ],
)
def test_refused_tables_and_seeds(tables: list[str], seeds: list[int], message: str, base: Recipe) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_tables(base, tables, seeds)
