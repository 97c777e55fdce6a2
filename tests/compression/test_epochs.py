"""Whole fine-tuning runs on small generated videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from pbd_ray.compression import epochs
from pbd_ray.compression.blocks import Model, from_detector, to_detector
from pbd_ray.compression.epochs import (
    EpochCost,
    EpochReport,
    epoch_batches,
    finished_model,
    history_from_json,
    history_to_json,
    run_epochs,
    selection_epochs,
)
from pbd_ray.compression.finetune import Diverged
from pbd_ray.compression.jobs import FineTuneJob
from pbd_ray.compression.scoring import detect_video
from pbd_ray.data.annotations import DETECTION_SCHEMA
from pbd_ray.detector.detector import Detector
from pbd_ray.metrics.mean_ap import mean_average_precision

UNTIMED = EpochCost(0.0, 0.0, 0)
WITH_DROP_PATH = (
    "detector.backbone.drop_path=0.5",
    "detector.head.drop_path=0.5",
    "detector.grid.augmentation=full",
)


def untimed(reports: Sequence[EpochReport]) -> list[EpochReport]:
    return [replace(report, cost=UNTIMED) for report in reports]


def whole_run(job: FineTuneJob, **rest: Any) -> tuple[list[EpochReport], list[dict[str, Tensor]], Any]:
    """Reports, the state after every epoch, and the run itself."""
    reports, states, tuning = [], [], None
    for report, tuning in run_epochs(job, **rest):
        reports.append(report)
        states.append(tuning.state())
    return untimed(reports), states, tuning


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(make_job: Callable[..., FineTuneJob]) -> tuple[FineTuneJob, Any, Any, Model]:
    """A job with every kind of random draw, its reports, its states, its model."""
    torch.manual_seed(1)
    job = make_job(*WITH_DROP_PATH)
    reports, states, run = whole_run(job)
    return job, reports, states, run.best_model()


def same_model(ours: Model, theirs: Model) -> bool:
    names = ours.weights.keys() == theirs.weights.keys() and ours.kept_blocks == theirs.kept_blocks
    return names and all((ours.weights[name] == value).all() for name, value in theirs.weights.items())


def test_the_same_job_twice(uninterrupted: tuple[FineTuneJob, Any, Any, Model]) -> None:
    """Reports and weights, bit for bit, whatever ran before; other places and rounds draw otherwise."""
    job, reports, states, model = uninterrupted
    torch.manual_seed(2)
    again, other_states, run = whole_run(job)
    assert again == reports and [report.epoch for report in reports] == [0, 1, 2]
    assert all(same(*pair) for pair in zip(states, other_states, strict=True))
    assert model.kept_blocks == (0, 2, 3, 4) and same_model(run.best_model(), model)
    for change in ({"grid_index": 1}, {"round": 2}):
        other, _ = next(iter(run_epochs(replace(job, **change))))
        assert other.losses != reports[0].losses


@pytest.mark.parametrize("done", [1, 2, 3])
def test_resuming_after_an_epoch(uninterrupted: tuple[FineTuneJob, Any, Any, Model], done: int) -> None:
    """History, states and final model are those of the run that was never interrupted."""
    job, reports, states, model = uninterrupted
    rest, later_states, _ = whole_run(job, history=reports[:done], state=states[done - 1])
    assert reports[:done] + rest == reports
    assert all(same(*pair) for pair in zip(states[done:], later_states, strict=True))
    assert same_model(finished_model(job, states[-1]), model)


def test_resuming_does_not_standardize_again(make_job: Callable[..., FineTuneJob]) -> None:
    job = make_job("detector.backbone.final_norm=true", standardize=True, teacher=None)
    start = from_detector(Detector(job.experiment.detector, 4))
    job = replace(job, student=start, config=job.config.model_copy(update={"trainable": "head"}))
    reports, states, run = whole_run(job)
    assert not torch.equal(
        states[0]["ema/backbone.norm.bias"], torch.tensor(start.weights["backbone.norm.bias"])
    )
    rest, later_states, _ = whole_run(job, history=reports[:1], state=states[0])
    assert reports[:1] + rest == reports
    assert all(same(*pair) for pair in zip(states[1:], later_states, strict=True))
    assert same_model(finished_model(job, states[-1]), run.best_model())


def test_ranks_are_one_process(make_job: Callable[..., FineTuneJob], on_ranks: Callable[..., Any]) -> None:
    """Two ranks share every batch and the selection videos, and agree on all of it."""
    job = make_job("detector.backbone.drop_path=0", "detector.head.drop_path=0")
    alone, _, _ = whole_run(job)
    (first, states, _), (second, other_states, _) = on_ranks(2, lambda **how: whole_run(job, **how))
    assert first == second and same(states[-1], other_states[-1])
    for ours, theirs in zip(first, alone, strict=True):
        assert asdict(ours.losses) == pytest.approx(asdict(theirs.losses), rel=1e-3, abs=1e-5)
        assert ours.selection_average_map == pytest.approx(theirs.selection_average_map, abs=1e-3)
    assert asdict(first[0].losses) == pytest.approx(asdict(alone[0].losses), rel=1e-5, abs=1e-6)


def test_the_finished_model_is_what_was_measured(make_job: Callable[..., FineTuneJob], config: Any) -> None:
    """The best epoch's selection mAP, measured again on the model that comes out."""
    job = make_job()
    reports, states, _ = whole_run(job)
    detector = to_detector(finished_model(job, states[-1]), config, 4)
    tables = [
        detect_video(detector, video, job.source, job.window_batch, torch.device("cpu"))
        for video in job.selection.videos
    ]
    names = [video.id for video in job.selection.videos]
    quality = mean_average_precision(
        job.selection.ground_truth(), pa.concat_tables(tables), (0.3, 0.4, 0.5, 0.6, 0.7), 4, names
    )
    best = [report for report in reports if report.best][-1]
    assert best.selection_map == pytest.approx(quality.map[0.5], abs=1e-6)
    assert best.selection_average_map == pytest.approx(quality.average_map, abs=1e-6)


@dataclass(frozen=True)
class Quality:
    map: float
    average_map: float

    def at(self, tiou: Any) -> float:
        return self.map


def scripted(monkeypatch: pytest.MonkeyPatch, values: Sequence[tuple[float, float]]) -> None:
    """The selection mAPs that will be 'measured', in turn."""
    left = iter(values)
    monkeypatch.setattr(epochs, "detect_video", lambda *_: DETECTION_SCHEMA.empty_table())
    monkeypatch.setattr(epochs, "mean_average_precision", lambda *_: Quality(*next(left)))


BEST = [
    ("the higher mAP", [(0.2, 0.9), (0.4, 0.1), (0.3, 0.9)], [True, True, False]),
    ("then the better average", [(0.4, 0.1), (0.4, 0.2), (0.4, 0.15)], [True, True, False]),
    ("then the earlier epoch", [(0.4, 0.2), (0.4, 0.2), (0.4, 0.2)], [True, False, False]),
    ("all zero", [(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)], [True, False, False]),
    ("the last", [(0.1, 0.1), (0.2, 0.1), (0.3, 0.1)], [True, True, True]),
]


@pytest.mark.parametrize(("values", "best"), [pytest.param(*case[1:], id=case[0]) for case in BEST])
def test_best_epoch(
    make_job: Callable[..., FineTuneJob],
    monkeypatch: pytest.MonkeyPatch,
    values: list[tuple[float, float]],
    best: list[bool],
) -> None:
    """Its EMA weights come out in the end, after a restart too."""
    job = make_job()
    scripted(monkeypatch, values)
    reports, states, _ = whole_run(job)
    assert [report.best for report in reports] == best
    assert [(report.selection_map, report.selection_average_map) for report in reports] == values
    chosen = max(epoch for epoch, is_best in enumerate(best) if is_best)
    for name, value in states[-1].items():
        if name.startswith("best/"):
            assert torch.equal(value, states[chosen][name.replace("best/", "ema/")]), name
    scripted(monkeypatch, values[1:])
    rest, later_states, _ = whole_run(job, history=reports[:1], state=states[0])
    assert rest == reports[1:] and same(later_states[-1], states[-1])


@pytest.mark.parametrize(
    ("every", "measured"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2, 3]), (4, [3]), (9, [3])]
)
def test_selection_every_so_many_epochs(
    make_job: Callable[..., FineTuneJob], every: int, measured: list[int]
) -> None:
    job = make_job("alignment.optimizer.epochs=4", f"alignment.select_every_epochs={every}")
    reports = [report for report, _ in run_epochs(job)]
    found = [report.epoch for report in reports if report.selection_map is not None]
    assert found == measured
    assert all((report.selection_average_map is None) == (report.selection_map is None) for report in reports)
    assert reports[measured[0]].best


@pytest.mark.parametrize(
    ("every", "halving", "measured"),
    [
        (1, "null", [1, 2, 3, 4, 5, 6]),
        (4, "null", [4, 6]),
        (4, "on", [1, 2, 4, 6]),
        (9, "{first_epochs: 3}", [3, 6]),
    ],
)
def test_selection_is_measured_where_a_rung_may_end(
    make_job: Callable[..., FineTuneJob], every: int, halving: str, measured: list[int]
) -> None:
    job = make_job(
        "alignment.optimizer.epochs=6",
        "alignment.optimizer.schedule_epochs=6",
        f"alignment.select_every_epochs={every}",
        f"alignment.halving={halving}",
    )
    assert sorted(selection_epochs(job.config)) == measured


def test_a_rung_ends_on_the_way(uninterrupted: tuple[FineTuneJob, Any, Any, Model]) -> None:
    """The schedule spans all epochs: what a rung has done is what the whole run had done by then."""
    job, reports, states, _ = uninterrupted
    first, first_states, _ = whole_run(job, until=1)
    assert first == reports[:1] and same(first_states[-1], states[0])
    rest, later_states, _ = whole_run(job, until=2, history=first, state=first_states[-1])
    assert rest == reports[1:2] and same(later_states[-1], states[1])
    assert whole_run(job, until=1, history=reports[:2], state=states[1])[0] == []


def test_history_in_a_checkpoint(uninterrupted: tuple[FineTuneJob, Any, Any, Model]) -> None:
    _, reports, _, _ = uninterrupted
    assert list(history_from_json(history_to_json(reports))) == reports


def test_cost_of_an_epoch(make_job: Callable[..., FineTuneJob]) -> None:
    """4 fit videos are 4 windows; selection takes its share of the seconds."""
    report, _ = next(iter(run_epochs(make_job())))
    assert 0 < 4 / report.cost.windows_per_second < report.cost.seconds
    assert 2**25 < report.cost.peak_memory_bytes < 2**36


@pytest.mark.parametrize(("size", "expected"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (3, [3]), (4, [4]), (7, [4])])
def test_batches_of_an_epoch(make_job: Callable[..., FineTuneJob], size: int, expected: list[int]) -> None:
    """No video twice; what does not fill a batch is left out, unless it is all there is."""
    job = make_job(f"alignment.optimizer.batch_size={size}")
    names = {video.id for video in job.fit.videos}
    orders = []
    for epoch in range(8):
        batches = epoch_batches(job, epoch)
        assert [len(batch) for batch in batches] == expected
        order = [video.id for batch in batches for video in batch]
        assert len(set(order)) == len(order) and set(order) <= names
        assert epoch_batches(job, epoch) == batches
        orders.append(order)
    assert len({tuple(order) for order in orders}) > 3
    assert {name for order in orders for name in order} == names


def test_batches_depend_on_seed_and_round_not_on_the_grid(make_job: Callable[..., FineTuneJob]) -> None:
    """Every learning rate sees the same videos in the same order."""

    def order(job: FineTuneJob) -> list[str]:
        return [v.id for epoch in range(4) for batch in epoch_batches(job, epoch) for v in batch]

    job = make_job()
    assert order(replace(job, grid_index=3, learning_rate=1.0)) == order(job)
    assert order(replace(job, round=2)) != order(job)
    assert order(make_job("seed=1")) != order(job)


@pytest.mark.parametrize("mode", ["full", "lora_only"])
def test_other_trainable_sets(make_job: Callable[..., FineTuneJob], mode: str) -> None:
    """A whole run; the teacher's job is one of them."""
    job = make_job(f"alignment.trainable={mode}", "alignment.optimizer.epochs=1")
    (first,) = (epoch for epoch, _ in run_epochs(job))
    assert first.best and math.isfinite(first.losses.total)


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_precision_of_training_and_selection(make_job: Callable[..., FineTuneJob], autocast: str) -> None:
    job = make_job(f"autocast={autocast}", "alignment.optimizer.epochs=1")
    exact = next(iter(run_epochs(make_job("alignment.optimizer.epochs=1"))))[0]
    half = next(iter(run_epochs(job)))[0]
    assert (half.losses == exact.losses) == (autocast == "none")
    assert half.losses.total == pytest.approx(exact.losses.total, rel=0.05)


def test_divergence_ends_the_run(make_job: Callable[..., FineTuneJob], student: Model) -> None:
    weights = dict(student.weights)
    weights["head.class_output.bias"] = weights["head.class_output.bias"] * math.nan
    job = make_job(student=Model(student.kept_blocks, weights), learning_rate=0.25)
    with pytest.raises(Diverged, match=r"^loss nan at step 0 with learning rate 0\.25$"):
        next(iter(run_epochs(job)))


def test_the_guide_has_its_own_architecture(make_job: Callable[..., FineTuneJob]) -> None:
    job = make_job()
    gelu = job.experiment.detector
    relu = gelu.model_copy(update={"backbone": gelu.backbone.model_copy(update={"activation": "relu"})})
    student = replace(job, experiment=job.experiment.model_copy(update={"detector": relu}), guide=gelu)
    _, tuning = next(run_epochs(student, until=1))
    assert tuning.teacher is not None
    assert (tuning.student.config, tuning.teacher.config) == (relu, gelu)
