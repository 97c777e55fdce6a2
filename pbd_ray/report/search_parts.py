"""Sections of a run's page about the search: why blocks went, how students were fine-tuned, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pbd_ray.metrics.guards import GUARDED
from pbd_ray.report import panels
from pbd_ray.report.evidence import Evidence
from pbd_ray.report.explain import AXIS, MEANING, CandidateInfo, candidates_info, origin_info
from pbd_ray.report.findings import RateCurve, curves_info
from pbd_ray.report.forecast import outcome_text
from pbd_ray.report.parts import Figure, Part, Table, figure, row_height, signed
from pbd_ray.report.search_cost import StageCost, search_cost_info

MOST_ROWS = 20
"""A longer table is folded."""


def candidates_part(evidence: Evidence) -> Part | None:
    """Every candidate of every round; None where nothing was scored."""
    figures, tables = [], []
    for entry in evidence.summary["rounds"]:
        origin, number = origin_info(evidence.summary, entry), entry["round"]
        candidates = candidates_info(entry, origin)
        if not candidates:
            continue
        draw = partial(
            panels.draw_candidates,
            candidates=candidates,
            undropped=entry["undropped_score"],
            name=AXIS[entry["criterion"]],
            higher_is_better=entry["criterion"] == "map",
        )
        caption = f"Round {number}: of {len(candidates)} candidates block {candidates[0].block} went."
        if origin.tried:
            tried = ", ".join(map(str, origin.tried))
            first = next(iter(origin.tried))
            caption += f" Rolled back before, by the same scores: {tried}; distances are from {first}."
        told = (f"block {one.block} {_score(one)}" for one in candidates)
        figures.append(figure(f"candidates-{number}", caption, told, draw, row_height(len(candidates))))
        tables.append(_candidates_table(number, candidates))
    if not figures:
        return None
    meaning = MEANING[evidence.recipe.experiment.scoring.criterion]
    text = (
        f"Criterion: {meaning}. A bar is the paired bootstrap interval over videos of a candidate's "
        "distance from the best one, which went unless it was rolled back. Hollow: stopped by racing, worse "
        "beyond doubt, on fewer videos. Dashed: the student with nothing removed."
    )
    return Part("Why these blocks", text, tuple(figures), folded=tuple(tables))


def judgement_part(evidence: Evidence) -> Part | None:
    """What the selection videos said of every round; None where the recipe lets them say nothing."""
    rounds = evidence.summary["rounds"]
    rows = []
    for entry in rounds:
        interval = entry["selection_interval"]
        if interval is not None:
            limit = f"-{interval['margin']:g}"
            rows.append((str(entry["round"]), "mAP", _difference(interval), limit, interval["verdict"]))
        for guard in entry["guards"]:
            limit = f"{-guard['limit']:g}" if guard["what"] == "class_loss" else f"{guard['limit']:+g}"
            name = f"{GUARDED[guard['what']]} {guard['name']}"
            rows.append((str(entry["round"]), name, _difference(guard), limit, guard["verdict"]))
    if not rows:
        return None
    back = [f"Round {entry['round']} was rolled back." for entry in rounds if not entry["standing"]]
    text = (
        "Whether a round stands is decided on the selection videos, student less teacher: only what is "
        "inferior, its whole interval beyond the limit, is rolled back; undecided goes on."
    )
    columns = ("round", "of", "difference (interval)", "limit", "verdict")
    table = Table("Student less teacher, selection videos", columns, tuple(rows))
    told, long = " ".join([text, *back]), len(rows) > MOST_ROWS
    return Part("Which rounds stand", told, tables=() if long else (table,), folded=(table,) if long else ())


def rates_part(evidence: Evidence, headline: str) -> Part | None:
    """The fine-tuning runs of every round; None where nothing was trained."""
    figures: list[Figure] = []
    ended: list[str] = []
    chosen_on = "test" if evidence.recipe.experiment.paper_protocol else "selection"
    for entry, depth in zip(evidence.summary["rounds"], evidence.rounds, strict=True):
        if depth.curves is not None:
            name = f"{headline} on {chosen_on} videos"
            figures += _rate_figures(
                entry["round"], curves_info(depth.curves), (entry["lr"], entry["epoch"]), name
            )
            tried = depth.measured.get("stages", {}).get("align", {}).get("learning_rates", {})
            ended += [
                f"Round {entry['round']}, {rate}: {run['diverged']}."
                for rate, run in tried.items()
                if run.get("diverged")
            ]
    if not figures:
        return None
    neither = "" if evidence.recipe.experiment.paper_protocol else ", which neither train nor test"
    text = (
        "One line a learning rate. Learning rate and epoch are chosen by mAP on the "
        f"{chosen_on} videos{neither}; the ring is the choice."
    )
    return Part("How the students were fine-tuned", " ".join([text, *ended]), tuple(figures))


def cost_part(evidence: Evidence) -> Part | None:
    """What the search itself cost; None before anything was measured."""
    stages = search_cost_info(evidence)
    if not stages:
        return None
    plan = evidence.plan
    if plan is None:
        expected = (
            "the seconds that the stage took when it was first run, times how much more or less there was to "
            "multiply"
        )
    else:
        taken = {(stage.round, stage.stage): stage.seconds for stage in stages if not stage.resumed}
        expected = f"by the plan that was made before; {outcome_text(plan, taken)}"
    text = (
        "Seconds are wall-clock; * of a stage that was interrupted, its last part. Expected: "
        f"{expected}. Hours are of CPUs and GPUs held, busy or not. Measuring latency is not among them."
    )
    total = (
        "all",
        "",
        f"{sum(stage.seconds for stage in stages):.1f}",
        "",
        f"{sum(stage.cpu_hours for stage in stages):.4f}",
        f"{sum(stage.gpu_hours for stage in stages):.4f}",
    )
    columns = ("round", "stage", "seconds", "expected", "CPU hours", "GPU hours")
    rows = (*(_stage_row(stage) for stage in stages), total)
    return Part("What the search cost", text, tables=(Table("By round and stage", columns, rows),))


def _difference(found: Mapping[str, Any]) -> str:
    few = f", unreliable: {found['videos']} videos" if found["unreliable"] else ""
    return signed(found["difference"], found["low"], found["high"]) + few


def _candidates_table(number: int, candidates: Sequence[CandidateInfo]) -> Table:
    columns = ("block", "score", "behind", "interval", "videos", "")
    rows = tuple(
        (
            str(one.block),
            _score(one),
            "–" if one.behind is None else f"{one.behind:.4g}",
            "–" if one.low is None or one.high is None else f"[{one.low:.4g}, {one.high:.4g}]",
            str(one.videos),
            one.fate,
        )
        for one in candidates
    )
    return Table(f"Round {number}: all candidates", columns, rows)


def _rate_figures(
    number: int, curves: Sequence[RateCurve], chosen: tuple[float, int], name: str
) -> list[Figure]:
    rate, epoch = chosen
    captions = {
        "selection_map": f"Round {number}: learning rate {rate:.3g}, epoch {epoch} was chosen.",
        "total": f"Round {number}: training loss.",
    }
    names = {"selection_map": name, "total": "training loss"}
    return [
        figure(
            f"rates-{number}-{field}",
            caption,
            (f"{curve.label}: {_values(getattr(curve, field))}" for curve in curves),
            partial(panels.draw_curves, curves=curves, chosen=chosen, field=field, name=names[field]),
        )
        for field, caption in captions.items()
    ]


def _stage_row(stage: StageCost) -> tuple[str, ...]:
    return (
        "teacher" if stage.round == 0 else str(stage.round),
        stage.stage,
        f"{stage.seconds:.1f}{' *' if stage.resumed else ''}",
        "–" if stage.expected_seconds is None else f"{stage.expected_seconds:.1f}",
        f"{stage.cpu_hours:.4f}",
        f"{stage.gpu_hours:.4f}",
    )


def _score(candidate: CandidateInfo) -> str:
    return "–" if candidate.score is None else f"{candidate.score:.4g}"


def _values(values: Sequence[float | None]) -> str:
    return ", ".join("–" if value is None else f"{value:.4f}" for value in values)
