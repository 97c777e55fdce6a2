"""The paper's supplementary experiments on any recipe: the runs they are made of. Pure.

An *arm* is the recipe with a few changes; it is run once for each seed, by the ordinary round loop. All arms
drop the same number of blocks and start from the same teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import Any, Literal

import numpy as np

from pbd_ray.config import ConfigError, Recipe, changed

Kind = Literal["free", "ordered", "swapped"]

RANDOM_SETS = 5
"""One-shot drops of random blocks, for each seed."""
FULL_RATE_RATIO = 0.1
"""Full fine-tuning moves every weight, LoRA a few new ones: its learning rates lie this much lower."""
PAPER_DEPTH = 12
_DRAW = 0xAB1A
"""Keeps these draws apart from others made with a recipe's seed."""


@dataclass(frozen=True)
class Arm:
    """One way to compress."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Values of the recipe by key, as overrides name them."""
    kind: Kind = "free"
    """ordered: drops the blocks that our method dropped with the same seed, in that order. swapped: takes our
    method's last model and gives it another activation (`search/relu_swap.py`)."""


OURS = Arm("ours")


@dataclass(frozen=True)
class Run:
    """An arm with a seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """In logs, on dashboards, and of its directory below `arms/`."""
        return f"{self.arm.name}-seed{self.seed}"


def ablation_recipe(recipe: Recipe) -> Recipe:
    """The recipe that all arms begin with: the number of drops is fixed, as no arm may stop before another,
    and so are the selection videos, as all start from one teacher.

    Raises:
        ConfigError: the recipe drops nothing or aligns nothing, or says what is up to the arms: blocks,
            rounds that align, the activation.
    """
    experiment = recipe.experiment
    if experiment.scoring.drops is not None:
        raise ConfigError(
            f"scoring.drops {list(experiment.scoring.drops)}: an ablation chooses blocks by itself"
        )
    if experiment.alignment.rounds != "every":
        raise ConfigError(
            f"alignment.rounds {experiment.alignment.rounds}: an ablation chooses rounds by itself"
        )
    if experiment.alignment.trainable == "none":
        raise ConfigError("alignment.trainable none: an ablation compares ways to align")
    if experiment.detector.backbone.activation != "gelu":
        activation = experiment.detector.backbone.activation
        raise ConfigError(f"detector.backbone.activation {activation}: an ablation swaps a GELU for it")
    if experiment.max_drops < 1:
        raise ConfigError(f"stopping.max_drops {experiment.max_drops}: an ablation needs a block to drop")
    split_seed = experiment.seed if experiment.data.split_seed is None else experiment.data.split_seed
    stopping = {"max_drops": experiment.max_drops}
    return changed(recipe, {"stopping": stopping, "data.split_seed": split_seed})


def run_recipe(base: Recipe, run: Run, run_dir: str, order: Sequence[int] | None) -> Recipe:
    """What a run is told.

    Args:
        base: from `ablation_recipe`.
        order: blocks that our method dropped with this seed; for ordered arms.
    """
    changes = dict(run.arm.changes)
    if run.arm.kind == "ordered":
        assert order is not None, "the order is known before an arm that follows it is run"
        changes["scoring.drops"] = list(order)
    # Loggers are Ray Tune's, and a cap would end some arms before others.
    alone: dict[str, Any] = {"backend": "local", "loggers": [], "max_device_hours": None}
    name = f"{base.experiment.name}-{run.arm.name}"
    return changed(base, {**changes, **alone, "name": name, "seed": run.seed, "run_dir": run_dir})


def variant(base: Recipe, name: str, changes: Mapping[str, Any], kind: Kind = "free") -> Arm:
    """An arm of that name, or our method itself where the changes change nothing."""
    return OURS if changed(base, changes) == base else Arm(name, changes, kind)


def one_shot(base: Recipe, blocks: Sequence[int]) -> Arm:
    """All blocks at once, then one alignment as long as those of our rounds together (Table B)."""
    experiment = base.experiment
    rounds = [experiment.alignment_after(drops).optimizer for drops in range(1, len(blocks) + 1)]
    return Arm(
        f"one-shot-{'-'.join(map(str, blocks))}",
        {
            "scoring.drops": list(blocks),
            "alignment.rounds": "last",
            "alignment.optimizer.epochs": sum(optimizer.epochs for optimizer in rounds),
            "alignment.optimizer.schedule_epochs": sum(optimizer.schedule_epochs for optimizer in rounds),
            "alignment.later_epochs": None,
        },
    )


def fixed_set(paper: Sequence[int], depth: int, drops: int) -> tuple[int, ...]:
    """A set of blocks of the paper's 12, stretched to another depth and another number of drops.

    Places keep their share of the depth; between the paper's places they are interpolated. Two that fall on
    one block take neighbours.
    """
    shares = np.interp(
        np.linspace(0, len(paper) - 1, drops) if drops > 1 else [(len(paper) - 1) / 2],
        np.arange(len(paper)),
        np.array(paper) / (PAPER_DEPTH - 1),
    )
    chosen: list[int] = []
    for share in shares:
        place = share * (depth - 1)
        chosen.append(min(set(range(depth)) - set(chosen), key=lambda block: (abs(block - place), block)))
    return tuple(sorted(chosen))


def random_sets(seed: int, depth: int, drops: int) -> tuple[tuple[int, ...], ...]:
    """RANDOM_SETS different sets of blocks, drawn by seed; fewer where there are no more."""
    if comb(depth, drops) <= RANDOM_SETS:
        return tuple(combinations(range(depth), drops))
    rng = np.random.default_rng(np.random.SeedSequence((seed, _DRAW)))
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < RANDOM_SETS:
        drawn[tuple(sorted(rng.choice(depth, size=drops, replace=False).tolist()))] = None
    return tuple(drawn)


def full_rates(base: Recipe, given: Sequence[float] | None) -> list[float]:
    """The grid of full fine-tuning: the one given, else the recipe's at FULL_RATE_RATIO, to five digits."""
    if given is not None:
        return list(given)
    return [float(f"{rate * FULL_RATE_RATIO:.5g}") for rate in base.experiment.alignment.learning_rates]
