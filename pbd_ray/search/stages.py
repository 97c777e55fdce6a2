"""The stages of a round. Each looks into the ledger first and does only what is missing there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pbd_ray.compression.candidates import SweepRows, candidate_scores, compared
from pbd_ray.compression.choice import choose_block, tied_on_map
from pbd_ray.config import Recipe, ScoringConfig
from pbd_ray.data.annotations import Annotations, Split
from pbd_ray.search.evaluation import evaluate, guards_between, interval_between
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.round_folder import RoundFolder
from pbd_ray.search.slices import scoring_videos
from pbd_ray.search.state import (
    TEACHER_ROUND,
    UNDROPPED,
    AlignTask,
    CandidateScore,
    Choice,
    Cost,
    Criterion,
    Decision,
    Evaluation,
    Guard,
    Interval,
    Model,
    Steps,
    SweepKind,
    SweepTask,
    without_block,
)
from pbd_ray.search.sweeping import Report, Sweeper, label, measuring

ToBundle = Callable[[Model, Mapping[str, Any]], Mapping[str, bytes]]
"""Model and facts about its making -> the bundle's files by name."""
FromBundle = Callable[[Mapping[str, bytes], str], Model]
"""The bundle's files by name, and where they lie, for errors -> the model."""


@dataclass(frozen=True)
class Stages:
    """Score and drop, align, evaluate, measure: every argument of `controller.compress`, kept."""

    recipe: Recipe
    split: Split
    steps: Steps
    ledger: Ledger
    to_bundle: ToBundle
    from_bundle: FromBundle
    cost: Callable[[Model], Cost]
    report: Report

    def decide(
        self, folder: RoundFolder, student: Model, teacher: Model, tried: Sequence[Decision]
    ) -> Decision:
        """Score the removal of every block of the student and choose the one that goes.

        Args:
            tried: what was decided of this student before and rolled back; then the runner-up of those scores
                goes.
        """
        stored = folder.read_decision()
        if stored is not None:
            return stored
        scoring = self.recipe.experiment.scoring
        if scoring.drops is not None:
            block = scoring.drops[folder.round - 1]
            kept = without_block(student, block).kept_blocks
            decision = Decision(folder.round, "given", block, kept, (), None)
        else:
            if tried:
                scores = tried[-1].scores
                choice = choose_block(scores, scoring, without=[one.dropped_block for one in tried])
            else:
                choice, scores = self._choose(folder, student, teacher)
            kept = without_block(student, choice.block).kept_blocks
            decision = Decision(
                folder.round, scoring.criterion, choice.block, kept, scores, choice.tie, choice.near
            )
        folder.write_decision(decision)
        runner_up = f", the runner-up of {tried[-1].dropped_block}" if tried else ""
        why = _why(decision, scoring)
        self.report(f"{label(folder.round)}: drop block {decision.dropped_block}{runner_up}{why}")
        return decision

    def _choose(
        self, folder: RoundFolder, student: Model, teacher: Model
    ) -> tuple[Choice, tuple[CandidateScore, ...]]:
        scoring, blocks = self.recipe.experiment.scoring, student.kept_blocks
        sweep, scores = self._scores(folder, "scores", student, teacher, scoring.criterion, blocks)
        # Where mAP cannot tell candidates apart (on training videos it saturates; of a detector that finds
        # nothing it is 0 throughout) the training loss does.
        tied = tied_on_map(scores, scoring) if _map_is_blind(scores, scoring) else ()
        if tied:
            _, found = self._scores(folder, "tie", student, teacher, "train_loss", tied)
            losses = {score.block: score.score for score in found if score.block in tied}
            scores = tuple(replace(score, train_loss=losses.get(score.block)) for score in scores)
        choice = choose_block(scores, scoring)
        experiment = self.recipe.experiment
        return choice, compared(scores, choice.block, sweep, experiment, self._scoring_videos)

    def align(self, folder: RoundFolder, decision: Decision, task: AlignTask) -> Model:
        """The student fine-tuned and merged; as it is where the recipe trains nothing in this round."""
        if folder.read_alignment() is None:
            model, learning_rate, epoch, curves = task.student, None, 0, pa.table({})
            if self._aligns(decision.kept_blocks):
                self.report(f"{label(task.round)}: align, {len(decision.kept_blocks)} blocks")
                with measuring(folder, "align", self.recipe.execution) as measured:
                    found = self.steps.align(task)
                    measured |= found.measured
                model, curves = found.model, found.curves
                learning_rate, epoch = found.learning_rate, found.epoch
            assert model.kept_blocks == decision.kept_blocks, "alignment must keep the student's blocks"
            facts = {
                "experiment": self.recipe.experiment.name,
                "round": task.round,
                "dropped_block": decision.dropped_block,
                "learning_rate": learning_rate,
                "epoch": epoch,
                "parent_result": task.parent_result,
            }
            folder.write_alignment(self.to_bundle(model, facts), learning_rate, epoch, curves)
        return self.model(folder)

    def evaluate(self, folder: RoundFolder, model: Model) -> Evaluation:
        """The model on the test videos, read this once; against the teacher but for the teacher itself."""
        stored = folder.read_evaluation()
        if stored is not None:
            return stored
        experiment, videos = self.recipe.experiment, self.split.test
        task = SweepTask(_name(folder, "evaluation"), folder.round, model, (), "map", "test")
        rows = self._sweeper.rows(folder, "evaluation", task, videos).table
        teacher = None if folder.round == TEACHER_ROUND else self.ledger.teacher.read_slices("evaluation")
        evaluation = evaluate(
            videos, rows, teacher, experiment.evaluation, experiment.seed, model, self.cost(model)
        )
        interval, guards = self._recovery(folder, model)
        evaluation = replace(evaluation, selection_interval=interval, guards=guards)
        folder.write_evaluation(evaluation)
        return evaluation

    def measure_latency(self, folder: RoundFolder, model: Model) -> None:
        """Once a round, before the stopping rule reads it: a resumed run stops where the first did."""
        if "latency" not in folder.read_measured():
            latency = dict(self.steps.latency(model))
            folder.write_measured(folder.read_measured() | {"latency": latency})

    def model(self, folder: RoundFolder) -> Model:
        """The model of a round whose bundle is written."""
        bundle = folder.read_bundle()
        assert bundle is not None, f"{folder.name} has no bundle"
        return self.from_bundle(bundle, self.ledger.storage.uri(folder.bundle))

    def _aligns(self, kept_blocks: tuple[int, ...]) -> bool:
        experiment = self.recipe.experiment
        if experiment.alignment.trainable == "none":
            return False
        left = experiment.detector.backbone.depth - experiment.max_drops
        return experiment.alignment.rounds == "every" or len(kept_blocks) == left

    def _recovery(self, folder: RoundFolder, model: Model) -> tuple[Interval | None, tuple[Guard, ...]]:
        """The student against the teacher on the selection videos, where the stopping rules ask for it."""
        experiment, videos = self.recipe.experiment, self.split.selection
        stopping, seed = experiment.stopping, experiment.seed
        if not stopping.judges:
            return None, ()
        task = SweepTask(_name(folder, "selection"), folder.round, model, (), "map", "selection")
        rows = self._sweeper.rows(folder, "selection", task, videos).table
        if folder.round == TEACHER_ROUND:
            return None, ()
        arms = videos, rows, self.ledger.teacher.read_slices("selection"), experiment.evaluation
        margin = stopping.tolerance
        interval = None if margin is None else interval_between(*arms, margin, seed)
        return interval, guards_between(*arms, stopping.guardrails, seed)

    def _scores(
        self,
        folder: RoundFolder,
        kind: SweepKind,
        student: Model,
        teacher: Model,
        criterion: Criterion,
        candidates: tuple[int, ...],
    ) -> tuple[SweepRows, tuple[CandidateScore, ...]]:
        experiment = self.recipe.experiment
        scoring = experiment.scoring
        # Only alignment terms look at the teacher; a sweep without them should not ship its weights.
        terms = criterion == "train_loss" and scoring.loss_terms == "total"
        task = SweepTask(
            name=_name(folder, kind),
            round=folder.round,
            model=student,
            candidates=candidates,
            criterion=criterion,
            subset="fit",
            teacher=teacher if terms else None,
        )
        videos = self._scoring_videos
        scores: tuple[CandidateScore, ...] = ()

        def watch(standing: SweepRows, final: bool) -> None:
            nonlocal scores
            scores = candidate_scores(standing, experiment, videos)
            self.steps.scored(task, scores, final)

        sweep = self._sweeper.rows(folder, kind, task, videos, watch)
        return sweep, scores

    @property
    def _scoring_videos(self) -> Annotations:
        experiment = self.recipe.experiment
        return scoring_videos(self.split.fit, experiment.scoring.video_fraction, experiment.seed)

    @property
    def _sweeper(self) -> Sweeper:
        return Sweeper(self.recipe, self.steps.sweep, self.report)


def _map_is_blind(scores: tuple[CandidateScore, ...], scoring: ScoringConfig) -> bool:
    saturated = any(score.block == UNDROPPED and score.score > scoring.saturation for score in scores)
    return saturated or all(score.score == 0 for score in scores if score.block != UNDROPPED)


def _why(decision: Decision, scoring: ScoringConfig) -> str:
    if decision.tie:
        return f" ({decision.tie})"
    if decision.near:
        blocks = ", ".join(map(str, decision.near))
        return f" (a tie with blocks {blocks}, within {scoring.delta:g}: the best score decides)"
    return ""


def _name(folder: RoundFolder, kind: SweepKind) -> str:
    return f"{folder.name.replace('rounds/', 'round-')}-{kind}"
