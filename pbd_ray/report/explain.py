"""Why a round dropped the block it dropped, from a `summary.json`: as numbers (pure) and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from pbd_ray.config import UserError
from pbd_ray.metrics.guards import GUARDED
from pbd_ray.report.plain import plain_text

_WIDTH = 160
MEANING = {
    "map": "mAP of the student without the block on the scoring videos, higher is better",
    "train_loss": "train loss of the student without the block on the scoring videos, lower is better",
    "mse": "mean squared difference between the block's input and output, lower is better",
    "given": "the recipe names the block (scoring.drops), nothing was scored",
}
AXIS = {
    "map": "mAP without the block",
    "train_loss": "train loss without the block",
    "mse": "mse of the block",
}


@dataclass(frozen=True)
class CandidateInfo:
    """One candidate of a round; None where it was not, or could not be, computed."""

    block: int
    score: float | None
    behind: float | None
    """How much worse than the block that went (after a roll-back: than the first that was tried) on the same
    videos, with its interval."""
    low: float | None
    high: float | None
    videos: int
    stopped: bool
    fate: str
    """went, rolled back in an earlier round, stopped by racing; or nothing of that."""


@dataclass(frozen=True)
class OriginInfo:
    """Where a round started."""

    before: Mapping[str, Any]
    """Entry of the last round before it that stands, or of the teacher."""
    tried: Mapping[int, int]
    """Block -> round that took it from the same model, by the same scores, and was rolled back. The first of
    them is the one that `behind` counts from."""


def origin_info(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> OriginInfo:
    """What a round of `summary.json` started from."""
    earlier = [one for one in summary["rounds"] if one["round"] < entry["round"]]
    stood = [one for one in earlier if one["standing"]]
    before = stood[-1] if stood else summary["teacher"]
    last = before.get("round", 0)
    return OriginInfo(before, {one["dropped_block"]: one["round"] for one in earlier if one["round"] > last})


def candidates_info(entry: Mapping[str, Any], origin: OriginInfo) -> tuple[CandidateInfo, ...]:
    """Candidates of a round's entry in `summary.json`: the dropped block, then the others by score, best
    first; those that racing stopped come after those scored on all videos."""
    sign = -1.0 if entry["criterion"] == "map" else 1.0

    def fate(block: int, facts: Mapping[str, Any]) -> str:
        if block == entry["dropped_block"]:
            return "went"
        if block in origin.tried:
            return f"rolled back in round {origin.tried[block]}"
        return "stopped by racing" if facts["stopped"] else ""

    def order(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, bool, float, float, float, int]:
        """As `compression.choice` prefers them."""
        block, facts = int(item[0]), item[1]
        score = math.inf if facts["score"] is None else sign * facts["score"]
        loss = math.inf if facts["train_loss"] is None else facts["train_loss"]
        ties = -(facts["average_map"] or 0.0), loss, block
        return block != entry["dropped_block"], facts["stopped"], score, *ties

    return tuple(
        CandidateInfo(
            block=int(block),
            score=facts["score"],
            behind=facts["behind"],
            low=facts["behind_low"],
            high=facts["behind_high"],
            videos=facts["videos"],
            stopped=facts["stopped"],
            fate=fate(int(block), facts),
        )
        for block, facts in sorted(entry["candidates"].items(), key=order)
    )


def explain_text(summary: Mapping[str, Any], round: int) -> str:
    """All that decided a round and whether it stands, and what the drop cost and saved, as plain text.

    Raises:
        UserError: the summary has no such round.
    """
    entries = {entry["round"]: entry for entry in summary["rounds"]}
    if round not in entries:
        there = f"1 to {max(entries)}" if entries else "none yet"
        raise UserError(f"round {round} is not among the committed rounds: {there}")
    entry, teacher = entries[round], summary["teacher"]
    origin = origin_info(summary, entry)
    criterion, candidates = entry["criterion"], candidates_info(entry, origin)
    lines = [
        f"round {round}: block {entry['dropped_block']} went, {_numbers(entry['kept_blocks'])} stay",
        _standing(entry),
        f"criterion {criterion}: {MEANING[criterion]}",
    ]
    if candidates:
        lines += ["", _scores(candidates), "", *_choice(entry, candidates, origin.tried)]
    rate = "nothing was trained" if entry["lr"] is None else f"{entry['lr']:.3g}, epoch {entry['epoch']}"
    lines += ["", f"learning rate chosen: {rate}"]
    lines += ["", _costs(teacher, origin.before, entry), ""]
    for subset, name in (("test", "interval"), ("selection", "selection_interval")):
        if entry[name] is not None:
            lines.append(f"headline mAP less the teacher's on {subset} videos: {_interval(entry[name])}")
    if entry["guards"]:
        lines += ["", _guards(entry["guards"]), ""]
    seconds = [f"{stage} {value:.1f}" for stage, value in entry["seconds"].items()]
    return "\n".join([*lines, f"seconds: {', '.join(seconds) or 'none measured'}"])


def _standing(entry: Mapping[str, Any]) -> str:
    if not entry["standing"]:
        return f"rolled back: {entry['rolled_back']}"
    return "stands, undecided on selection videos" if entry["undecided"] else "stands"


def _scores(candidates: tuple[CandidateInfo, ...]) -> str:
    rows = [
        [str(one.block), _score(one.score), _behind(one), str(one.videos), one.fate] for one in candidates
    ]
    return _table(["block", "score", "behind (interval)", "videos", ""], rows)


def _choice(
    entry: Mapping[str, Any], candidates: tuple[CandidateInfo, ...], tried: Mapping[int, int]
) -> list[str]:
    lines = [f"the student before, nothing removed: {_score(entry['undropped_score'])}"]
    lines.append(f"tie: {entry['tie'] or 'none'}")
    if entry["near"]:
        lines.append(f"within scoring.delta of the one that went: {_numbers(entry['near'])}")
    if tried:
        first = next(iter(tried))
        lines.append(f"chosen without {_numbers([*tried])}; behind is counted from {first}, the first choice")
    others = [candidate for candidate in candidates[1:] if candidate.block not in tried]
    if others:
        second = others[0]
        lines.append(
            f"runner-up: block {second.block}, score {_score(second.score)}, behind {_behind(second)}"
        )
    return lines


def _guards(guards: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{GUARDED[guard['what']]} {guard['name']}",
            f"{guard['difference']:+.4f} [{guard['low']:+.4f}, {guard['high']:+.4f}]",
            f"{guard['limit']:g}",
            guard["verdict"],
        ]
        for guard in guards
    ]
    return _table(["", "less the teacher's, selection videos", "limit", "verdict"], rows)


def _costs(teacher: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    depths = (teacher, before, after)
    rows = [[f"mAP@{tiou}", *(f"{depth['map'][tiou]:.4f}" for depth in depths), ""] for tiou in after["map"]]
    rows.append(["average mAP", *(f"{depth['average_map']:.4f}" for depth in depths), ""])
    for name, key, unit in (
        ("G MACs", "macs", 1e9),
        ("G MACs of the blocks", "block_macs", 1e9),
        ("M parameters", "params", 1e6),
        ("ms a window", "latency_ms", 1.0),
    ):
        shown = [f"{depth[key] / unit:.4g}" for depth in depths]
        rows.append([name, *shown, f"{after[key] / teacher[key]:.1%}"])
    return _table(["", "teacher", "before", "after", "after / teacher"], rows)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return plain_text(table, _WIDTH)


def _interval(interval: Mapping[str, Any]) -> str:
    few = ", too few videos to rely on" if interval["unreliable"] else ""
    return (
        f"{interval['difference']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}] "
        f"({interval['confidence']:.0%}, {interval['videos']} videos{few}): "
        f"{interval['verdict']} with margin {interval['margin']:g}"
    )


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _behind(candidate: CandidateInfo) -> str:
    if candidate.behind is None:
        return "-"
    if candidate.low is None or candidate.high is None:
        return f"{candidate.behind:.4g}"
    return f"{candidate.behind:.4g} [{candidate.low:.4g}, {candidate.high:.4g}]"


def _numbers(values: list[int]) -> str:
    return ", ".join(str(value) for value in values)
