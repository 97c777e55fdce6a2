"""Tables A to G of the paper's supplement: their rows, which runs a row needs, what is expected of it. Pure.

Numbers of the paper are given beside detectors of its depth, where they are known; most of the supplement's
are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pbd_ray.config import ConfigError, Recipe
from pbd_ray.search.ablation import (
    OURS,
    PAPER_DEPTH,
    Arm,
    Run,
    fixed_set,
    full_rates,
    one_shot,
    random_sets,
    variant,
)

Counted = Literal["guide", "swapped", "aligned"]
"""The model whose activation is swapped, the same after the swap, and that aligned again."""
Expected = Literal["above", "at least"]

PAPER_MAP = {
    0.5: {0: 0.7043, 1: 0.7106, 2: 0.7137, 3: 0.7047, 4: 0.6965},
    "average": {0: 0.3775, 1: 0.3794, 2: 0.3781, 3: 0.3777, 4: 0.3772},
}
"""Of the whole method with VideoMAE-S, by number of drops: mAP@0.5 on THUMOS14, average on ActivityNet."""
PAPER_FIXED_SETS = ((2, 5, 9), (0, 4, 7))


@dataclass(frozen=True)
class Row:
    """One line of a table: one way to compress, at one number of drops."""

    label: str
    drops: int
    arms: tuple[tuple[Arm, ...], ...]
    """Seed by seed; several of one seed are averaged."""
    against: str | None = None
    """Label of the row that this one is compared with: difference = that row - this one."""
    expected: Expected | None = None
    """What the paper says of that row: it lies above this one, or at least is not below."""
    paper: float | None = None
    counted: Counted | None = None
    """Which model of the swapped runs of this table has its zeros counted here."""


@dataclass(frozen=True)
class TablePlan:
    """One of the supplement's tables."""

    letter: str
    title: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    note: str = ""
    trainable: bool = False
    """Shows how many parameters train."""


def plan_tables(
    base: Recipe, letters: Sequence[str], seeds: Sequence[int], full_grid: Sequence[float] | None = None
) -> tuple[TablePlan, ...]:
    """The tables asked for.

    Args:
        base: from `ablation_recipe`.
        full_grid: learning rates of full fine-tuning; None: `full_rates`.

    Raises:
        ConfigError: a table or a seed that is none, or is named twice.
    """
    for letter in letters:
        if letter not in TABLES:
            raise ConfigError(f"--tables: '{letter}' is not one of {', '.join(TABLES)}")
    for what, values in (("tables", letters), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                f"--{what} {','.join(map(str, values))}: expected different values, one at least"
            )
    if min(seeds) < 0:
        raise ConfigError(f"--seeds {','.join(map(str, seeds))}: expected numbers from 0 on")
    plan = _Planner(base, tuple(seeds), full_rates(base, full_grid))
    return tuple(TABLES[letter](plan) for letter in letters)


def runs_of(tables: Sequence[TablePlan]) -> tuple[Run, ...]:
    """Every run once: our method's first, those that need its outcome last."""
    runs = {
        Run(arm, seed): None
        for table in tables
        for row in table.rows
        for seed, arms in zip(table.seeds, row.arms, strict=True)
        for arm in (OURS, *arms)
    }
    return tuple(sorted(runs, key=lambda run: (run.arm.kind != "free", run.arm != OURS)))


@dataclass(frozen=True)
class _Planner:
    base: Recipe
    seeds: tuple[int, ...]
    full_grid: list[float]

    @property
    def drops(self) -> int:
        return self.base.experiment.max_drops

    @property
    def paper(self) -> float | None:
        """The whole method's mAP at this recipe's number of drops."""
        return self.paper_map(self.drops)

    def paper_map(self, drops: int) -> float | None:
        """The whole method's mAP in the paper; None where the recipe's depth or metric is another."""
        experiment = self.base.experiment
        if experiment.detector.backbone.depth != PAPER_DEPTH:
            return None
        return PAPER_MAP.get(experiment.evaluation.headline_tiou, {}).get(drops)

    def each(self, *arms: Arm) -> tuple[tuple[Arm, ...], ...]:
        """The same arms for every seed."""
        return (arms,) * len(self.seeds)

    def ordered(self, name: str, **alignment: object) -> Arm:
        """Other alignment, our order of drops."""
        changes = {f"alignment.{key}": value for key, value in alignment.items()}
        return variant(self.base, name, changes, "ordered")

    def uncompressed(self) -> Row:
        return Row("uncompressed", 0, self.each(OURS), paper=self.paper_map(0))

    def table(
        self, letter: str, title: str, rows: Sequence[Row], note: str = "", trainable: bool = False
    ) -> TablePlan:
        return TablePlan(letter, title, tuple(rows), self.seeds, note, trainable)


def _order(plan: _Planner) -> TablePlan:
    rows = [
        Row(f"round {drops}", drops, plan.each(OURS), "uncompressed", paper=plan.paper_map(drops))
        for drops in range(1, plan.drops + 1)
    ]
    note = (
        "paper's order: 7, 10, 6, 3 (VideoMAE-S, THUMOS14); 20, 1, 4, 7, 6, 2 (-L); 6, 3, 8, 11 (ActivityNet)"
    )
    return plan.table(
        "A", "blocks dropped and learning rate of each round", [plan.uncompressed(), *rows], note
    )


def _one_shot(plan: _Planner) -> TablePlan:
    depth, drops = plan.base.experiment.detector.backbone.depth, plan.drops
    ours = "progressive (ours)"
    rows = [plan.uncompressed(), Row(ours, drops, plan.each(OURS), paper=plan.paper)]
    for paper in PAPER_FIXED_SETS:
        blocks = fixed_set(paper, depth, drops)
        label = f"one-shot {list(blocks)} (paper's {list(paper)})"
        rows.append(Row(label, drops, plan.each(one_shot(plan.base, blocks)), ours))
    drawn = tuple(
        tuple(one_shot(plan.base, blocks) for blocks in random_sets(seed, depth, drops))
        for seed in plan.seeds
    )
    rows.append(Row(f"one-shot, {len(drawn[0])} random sets a seed", drops, drawn, ours, "above"))
    note = "a summary of the paper's main text has one-shot dropping at 0.6891; not seen in the paper itself"
    return plan.table("B", "progressive against one-shot drops", rows, note)


def _sparse(plan: _Planner) -> TablePlan:
    gelu = "GELU (ours)"
    swap = Arm("relu", {"detector.backbone.activation": "relu"}, "swapped")
    rows = [
        Row(gelu, plan.drops, plan.each(OURS), paper=plan.paper, counted="guide"),
        Row("ReLU, after the swap", plan.drops, plan.each(), counted="swapped"),
        Row("ReLU, aligned again", plan.drops, plan.each(swap), gelu, counted="aligned"),
    ]
    return plan.table("C", "sparse activation", rows)


def _criterion(plan: _Planner) -> TablePlan:
    rows = [plan.uncompressed()]
    for criterion in ("map", "train_loss", "mse"):
        arm = variant(plan.base, f"criterion-{criterion.replace('_', '-')}", {"scoring.criterion": criterion})
        best = criterion == "map"
        rows.append(
            Row(
                criterion,
                plan.drops,
                plan.each(arm),
                None if best else "map",
                None if best else "above",
                plan.paper if best else None,
            )
        )
    return plan.table("D", "criterion that selects the block", rows)


def _no_fine_tuning(plan: _Planner) -> TablePlan:
    same = plan.each(plan.ordered("none-same-order", trainable="none"))
    greedy = plan.each(variant(plan.base, "none-greedy", {"alignment.trainable": "none"}))
    rows = [plan.uncompressed()]
    for drops in range(1, plan.drops + 1):
        tuned = f"fine-tuned, {drops} dropped"
        rows += [
            Row(tuned, drops, plan.each(OURS), paper=plan.paper_map(drops)),
            Row(f"not, {drops} dropped, same order", drops, same, tuned, "above"),
            Row(f"not, {drops} dropped, selected anew", drops, greedy, tuned, "above"),
        ]
    return plan.table("E", "with and without fine-tuning", rows)


def _full(plan: _Planner) -> TablePlan:
    lora = plan.ordered("lora", trainable="lora")
    full = plan.ordered("full", trainable="full", learning_rates=plan.full_grid)
    rows = [
        plan.uncompressed(),
        Row("LoRA", plan.drops, plan.each(lora), paper=plan.paper),
        Row("full", plan.drops, plan.each(full), "LoRA", "at least"),
    ]
    rates = ", ".join(f"{rate:g}" for rate in plan.full_grid)
    margin = plan.base.experiment.evaluation.noninferiority_margin
    note = (
        f"learning rates of full fine-tuning: {rates}; LoRA may be {margin:g} below it and still hold; "
        f"paper, trainable after 3 drops, in units of 2^20: LoRA 2.47, full 15.79"
    )
    return plan.table("F", "LoRA against full fine-tuning", rows, note, trainable=True)


def _head(plan: _Planner) -> TablePlan:
    lora, only = plan.ordered("lora", trainable="lora"), plan.ordered("lora-only", trainable="lora_only")
    rows = [
        plan.uncompressed(),
        Row("LoRA and head", plan.drops, plan.each(lora), paper=plan.paper),
        Row("LoRA only", plan.drops, plan.each(only), "LoRA and head", "above"),
    ]
    return plan.table("F4", "head trained jointly or frozen", rows, trainable=True)


def _levels(plan: _Planner) -> TablePlan:
    def losses(name: str, feature: bool, prediction: bool) -> tuple[tuple[Arm, ...], ...]:
        return plan.each(plan.ordered(name, feature_loss=feature, prediction_loss=prediction))

    joint = "feature and prediction"
    rows = [
        plan.uncompressed(),
        Row(joint, plan.drops, losses("both-losses", True, True), paper=plan.paper),
        Row("feature", plan.drops, losses("feature-only", True, False), joint),
        Row("prediction", plan.drops, losses("prediction-only", False, True), joint),
        Row("none", plan.drops, losses("no-alignment-losses", False, False), joint, "above"),
    ]
    return plan.table("G", "alignment losses", rows)


TABLES: dict[str, Callable[[_Planner], TablePlan]] = {
    "A": _order,
    "B": _one_shot,
    "C": _sparse,
    "D": _criterion,
    "E": _no_fine_tuning,
    "F": _full,
    "F4": _head,
    "G": _levels,
}
