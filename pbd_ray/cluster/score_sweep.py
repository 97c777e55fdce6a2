"""A round's candidates as Tune trials, beside the pool that computes them (design, section 4).

The pool computes, Tune keeps the candidates: one trial per candidate block reports the share of videos
seen and, once the driver has scored the sweep, its score. Tune's table, loggers and ResultGrid so speak
of candidates while every video is decoded once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError

from pbd_ray.cluster.candidate_trial import Board, CandidateTrial
from pbd_ray.cluster.loggers import tune_loggers
from pbd_ray.cluster.ray_storage import ray_storage
from pbd_ray.cluster.session import HEAD_RESOURCE
from pbd_ray.compression.candidates import CandidateScore
from pbd_ray.config import Recipe

_TRIALS_AT_ONCE = 4
"""A trial is a process of its own that only waits: more at once would cost the workers their CPU.
Later trials start in the processes of ended ones and read all that was published before."""
_END_SECONDS = 120.0


class CandidateTrials:
    """Tune over the candidates of one sweep, in a thread; the driver publishes, the trials report."""

    def __init__(self, name: str, candidates: Sequence[int], recipe: Recipe, storage: str) -> None:
        self._racing = tuple(candidates)
        board: Any = ray.remote(Board).options(
            name=f"{name} board", num_cpus=0, resources={HEAD_RESOURCE: 0.001}
        )
        self._board = board.remote()
        trainable: Any = tune.with_parameters(CandidateTrial, board=self._board)
        trainable = tune.with_resources(trainable, {HEAD_RESOURCE: 0.001})
        trainable.__qualname__ = CandidateTrial.__name__  # what the dashboard calls its actors
        tuner = tune.Tuner(
            trainable,
            param_space={"block": tune.grid_search(list(candidates))},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=min(_TRIALS_AT_ONCE, len(candidates)),
                trial_name_creator=lambda trial: _trial_name(name, trial.config["block"]),
                trial_dirname_creator=lambda trial: _trial_name(name, trial.config["block"]),
            ),
            run_config=tune.RunConfig(
                name=f"{name}-tune",
                verbose=0,
                callbacks=tune_loggers(recipe, storage),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                **ray_storage(storage),
            ),
        )
        self._thread = threading.Thread(target=tuner.fit, name=f"tune-{name}", daemon=True)
        self._thread.start()

    def seen(self, fraction: float) -> None:
        """All candidates still in the race have been scored on this share of the videos."""
        self._publish({block: {"fraction": fraction} for block in self._racing})

    def scored(self, scores: Sequence[CandidateScore], final: bool) -> None:
        """Scores so far; the trials of those whom racing has stopped end. Final ones end all, and are
        waited for."""
        told = {score.block: score for score in scores if score.block in self._racing}
        news = {block: _told(score, final or score.stopped) for block, score in told.items()}
        self._racing = tuple(block for block in self._racing if not (block in told and told[block].stopped))
        if final:
            self._end(news)
        else:
            self._publish(news)

    def abandon(self) -> None:
        """End the trials without scores: the sweep failed."""
        self._end({block: {"final": 1.0} for block in self._racing})

    def _end(self, final: dict[int, dict[str, float]]) -> None:
        self._publish(final)
        self._thread.join(_END_SECONDS)
        ray.kill(self._board)

    def _publish(self, news: dict[int, dict[str, Any]]) -> None:
        with contextlib.suppress(RayActorError):  # it died, and only those who watch miss it
            ray.get(self._board.publish.remote(news))


def _told(score: CandidateScore, ends: bool) -> dict[str, float]:
    news = {
        "score": score.score,
        "average_map": float("nan") if score.average_map is None else score.average_map,
        "videos": score.videos,
        "stopped": float(score.stopped),
    }
    return news | {"final": 1.0} if ends else news


def _trial_name(name: str, block: int) -> str:
    return f"{name}-block-{block:02d}"
