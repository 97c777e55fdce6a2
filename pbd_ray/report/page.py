"""report.html: the evidence of a run as one offline page, the answer first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pbd_ray import __version__
from pbd_ray.metrics.detad_rules import BUILT_IN, DetadRules
from pbd_ray.report.evidence import Evidence
from pbd_ray.report.findings import answer_text, warnings_info
from pbd_ray.report.outcome_parts import comparison_part, errors_part, frontier_part
from pbd_ray.report.parts import Part, Table, signed
from pbd_ray.report.rounds import DepthInfo, depths_info, frontier, headline_name
from pbd_ray.report.search_parts import candidates_part, cost_part, judgement_part, rates_part
from pbd_ray.report.templates import render

REPORT = "report.html"


@dataclass(frozen=True)
class Tile:
    what: str
    value: str
    beside: str


@dataclass(frozen=True)
class Cell:
    state: str
    """kept, drops (in this round), back (was tried in this round and taken back), gone."""
    mark: str


@dataclass(frozen=True)
class DepthRow:
    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class DepthMap:
    blocks: tuple[int, ...]
    rows: tuple[DepthRow, ...]
    has_rolled_back: bool


_MARKS = {"kept": "", "drops": "×", "back": "↩", "gone": ""}


def report_page(evidence: Evidence, rules: DetadRules | None = None) -> str:
    """The whole page as HTML; nothing in it is loaded from elsewhere, and all that comes from a user's files
    is escaped.

    Args:
        rules: DETAD's thresholds and buckets; None: those that the recipe names for its guardrails.
    """
    if rules is None:
        rules = BUILT_IN[evidence.recipe.experiment.stopping.guardrails.detad]
    summary, experiment = evidence.summary, evidence.recipe.experiment
    headline = headline_name(experiment.evaluation.headline_tiou)
    depths = frontier(depths_info(summary))
    standing = [
        (entry, depth)
        for entry, depth in zip(summary["rounds"], evidence.rounds, strict=True)
        if entry["standing"]
    ]
    last = standing[-1][0] if standing else None
    parts: list[Part | None] = [frontier_part(depths, headline)]
    if standing:
        student = standing[-1][1].detections
        parts += [comparison_part(evidence, student, headline), errors_part(evidence, student, rules)]
    parts += [candidates_part(evidence), judgement_part(evidence)]
    parts += [rates_part(evidence, headline), cost_part(evidence)]
    return render(
        "run.html.j2",
        title=f"{experiment.name}: {len(standing)} blocks dropped",
        name=experiment.name,
        heading=_heading(depths),
        verdict=last["interval"]["verdict"] if last else "",
        answer=answer_text(depths, last, headline),
        tiles=_tiles(depths, headline),
        stop_reason=summary["stop_reason"],
        warnings=warnings_info(evidence),
        depth_map=depth_map_info(summary),
        depths=_depths_table(depths, headline),
        parts=[part for part in parts if part is not None],
        provenance=_provenance(evidence),
        quarantined=_texts("Videos left out", ("video", "reason"), summary["quarantined"]),
        recipe=evidence.recipe.to_yaml(),
    )


def depth_map_info(summary: Mapping[str, Any]) -> DepthMap:
    """For the teacher and every round, what became of every block of the teacher."""
    blocks = tuple(summary["teacher"]["kept_blocks"])
    rows = [DepthRow("teacher", tuple(Cell("kept", "") for _ in blocks))]
    gone: set[int] = set()
    for entry in summary["rounds"]:
        tried, stands = entry["dropped_block"], entry["standing"]
        states = [
            ("drops" if stands else "back") if block == tried else "gone" if block in gone else "kept"
            for block in blocks
        ]
        rows.append(DepthRow(str(entry["round"]), tuple(Cell(state, _MARKS[state]) for state in states)))
        gone |= {tried} if stands else set()
    return DepthMap(blocks, tuple(rows), any(not entry["standing"] for entry in summary["rounds"]))


def _heading(depths: Sequence[DepthInfo]) -> str:
    first, last = depths[0], depths[-1]
    if last is first:
        return f"The teacher, {first.blocks} blocks"
    saved = 1 - last.macs_ratio
    return f"{first.blocks} blocks became {last.blocks}, with {saved:.0%} fewer multiplications"


def _tiles(depths: Sequence[DepthInfo], headline: str) -> list[Tile]:
    first, last = depths[0], depths[-1]
    if last is first:
        map_beside = "the teacher"
    else:
        map_beside = signed(last.difference or 0.0, last.low, last.high)
    return [
        Tile("Transformer blocks", f"{last.blocks}", f"of {first.blocks}"),
        Tile(headline, f"{last.headline_map:.4f}", map_beside),
        Tile("MACs a window", f"{last.macs / 1e9:.4g} G", f"{last.macs_ratio:.1%} of the teacher's"),
        Tile("Parameters", f"{last.params / 1e6:.4g} M", f"{last.params_ratio:.1%} of the teacher's"),
        Tile("Latency a window", f"{last.latency_ms:.4g} ms", f"{last.latency_ratio:.1%} of the teacher's"),
    ]


def _depths_table(depths: Sequence[DepthInfo], headline: str) -> Table:
    columns = [
        "round",
        "dropped",
        "blocks",
        "learning rate",
        *(f"mAP@{tiou}" for tiou in depths[0].map),
        "average",
    ]
    columns += [f"{headline} less the teacher's (interval)", "MACs", "parameters", "latency"]
    rows = []
    for depth in depths:
        less = "–" if depth.difference is None else signed(depth.difference, depth.low, depth.high)
        rows.append(
            (
                depth.label,
                "–" if depth.dropped_block is None else str(depth.dropped_block),
                str(depth.blocks),
                "–" if depth.learning_rate is None else f"{depth.learning_rate:.2g}",
                *(f"{value:.4f}" for value in depth.map.values()),
                f"{depth.average_map:.4f}",
                less,
                f"{depth.macs_ratio:.1%}",
                f"{depth.params_ratio:.1%}",
                f"{depth.latency_ratio:.1%}",
            )
        )
    return Table("Every depth, on the test videos", tuple(columns), tuple(rows))


def _provenance(evidence: Evidence) -> list[Table]:
    first, summary = evidence.environment["first"], evidence.summary
    facts = {
        "run directory": evidence.location,
        "pbd_ray that made this page": __version__,
        "Python": first["python"],
        "machine": f"{first['platform']}, {first['cpu']}",
        **first["versions"],
        "device": f"{first['device']}, {first['threads_per_worker']} threads a worker",
    }
    hashes = {
        "source": first["source_hash"],
        "annotations": first["data_hash"],
        "teacher's weights": first["teacher_hash"],
        "result of the teacher": summary["teacher"]["result"],
        **{f"result of round {entry['round']}": entry["result"] for entry in summary["rounds"]},
    }
    counts = {f"{name} videos": count for name, count in evidence.counts.items()}
    return [
        _texts("Made with", ("what", "value"), facts),
        _texts("Data", ("what", "value"), counts),
        _texts("Hashes (SHA-256)", ("of", "hash"), hashes),
    ]


def _texts(caption: str, columns: tuple[str, str], texts: Mapping[str, object]) -> Table:
    rows = tuple((name, str(value)) for name, value in texts.items())
    return Table(caption, columns, rows, prose=True)
