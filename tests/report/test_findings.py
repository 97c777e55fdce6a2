"""The numbers of a run's page, against the evaluator, the naive loop and the formulas they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.data.annotations import Annotations
from pbd_ray.metrics.detad import diagnose
from pbd_ray.metrics.detad_rules import THUMOS14
from pbd_ray.metrics.mean_ap import mean_average_precision
from pbd_ray.report.evidence import Evidence
from pbd_ray.report.findings import answer_text, comparison_info, curves_info, warnings_info
from pbd_ray.report.outcome_parts import errors_part, gain_pairs, missed_pairs
from pbd_ray.report.rounds import depths_info, frontier
from pbd_ray.report.search_parts import judgement_part


def test_comparison_is_the_evaluators(evidence: Evidence) -> None:
    """mAP and AP as the evaluator gives them on both tables; intervals hold the differences."""
    test, teacher, student = evidence.test, evidence.teacher.detections, evidence.rounds[-1].detections
    rules = evidence.recipe.experiment.evaluation
    found = comparison_info(test, teacher, student, rules, seed=0)
    names = [video.id for video in test.videos]
    theirs, ours = (
        mean_average_precision(test.ground_truth(), rows, rules.tious, 3, names)
        for rows in (teacher, student)
    )
    assert [one.name for one in found.tious] == ["0.3", "0.5", "average"]
    assert [one.teacher for one in found.tious] == [*theirs.map.values(), theirs.average_map]
    assert [one.student for one in found.tious] == [*ours.map.values(), ours.average_map]
    at = rules.tious.index(0.5)
    for one in found.classes:
        label = test.classes.index(one.name)
        assert (one.teacher, one.student) == (theirs.ap[at, label], ours.ap[at, label])
        assert one.instances == sum(int((video.labels == label).sum()) for video in test.videos)
    for one in (*found.tious, *found.classes):
        assert one.low < one.difference < one.high
    assert found.absent == ("never",)
    assert (found.videos, found.unreliable) == (24, False)
    differences = [one.difference for one in found.classes]
    assert differences == sorted(differences)


def test_a_student_against_itself(evidence: Evidence) -> None:
    rows = evidence.teacher.detections
    found = comparison_info(evidence.test, rows, rows, evidence.recipe.experiment.evaluation, seed=0)
    assert {(one.low, one.difference, one.high) for one in found.tious} == {(0.0, 0.0, 0.0)}


def test_errors_are_detads(evidence: Evidence) -> None:
    """The section's numbers are those of the analysis run by hand on both tables."""
    teacher, student = evidence.teacher.detections, evidence.rounds[-1].detections
    before, after = (diagnose(evidence.test, rows, THUMOS14) for rows in (teacher, student))
    part = errors_part(evidence, student, THUMOS14)
    positives, negatives = part.folded
    for row in positives.rows:
        assert row[1:] == (
            f"{before.error_counts[row[0]]:.1f}",
            f"{after.error_counts[row[0]]:.1f}",
            f"{before.gain[row[0]]:.4f}",
            f"{after.gain[row[0]]:.4f}",
        )
    for row in negatives.rows:
        name, bucket = row[0].rsplit(" ", 1)
        assert row[2] == f"{before.false_negative_rate[name][bucket]:.4f}"
        assert row[3] == f"{after.false_negative_rate[name][bucket]:.4f}"
    assert len(negatives.rows) == sum(len(buckets) for buckets in before.bucket_share.values())
    gains = gain_pairs(before, after)
    assert gains["Wrong\nLabel"] == (
        before.gain["Wrong Label Err"] * 100,
        after.gain["Wrong Label Err"] * 100,
    )
    missed = missed_pairs(before, after, "length")
    assert [name.split("\n")[0] for name in missed] == list(before.false_negative_rate["length"])


def test_no_instance_that_detad_counts(evidence: Evidence) -> None:
    """It leaves out what lasts longer than its video; then the section says so."""
    short = tuple(replace(video, duration_seconds=1e-3) for video in evidence.test.videos)
    part = errors_part(replace(evidence, test=replace(evidence.test, videos=short)), pa.table({}), THUMOS14)
    assert "no instance" in part.text
    assert not part.figures


def test_curves(evidence: Evidence) -> None:
    curves = evidence.rounds[0].curves
    assert curves is not None
    low, high = curves_info(curves)
    assert (low.learning_rate, high.learning_rate) == (1e-4, 1e-3)
    assert low.epochs == (1, 2, 3)
    assert low.selection_map == (None, 0.5 + 1e-4, 0.5 + 2e-4)
    assert low.total == (2.0, 1.0, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("verdict", "begins"),
    [("holds", "Lossless within"), ("undecided", "Undecided"), ("inferior", "Worse than")],
)
def test_lossless_is_said_only_where_it_holds(evidence: Evidence, verdict: str, begins: str) -> None:
    depths = frontier(depths_info(evidence.summary))
    entry = evidence.summary["rounds"][-1]
    told = answer_text(depths, entry | {"interval": entry["interval"] | {"verdict": verdict}}, "mAP@0.5")
    assert told.startswith(begins)
    assert ("Lossless" in told) == (verdict == "holds")
    assert "2 of 4 blocks are gone (2, 3)" in told
    assert "margin set beforehand is 0.01" in told


def test_judgement(evidence: Evidence) -> None:
    """Only where the recipe had rounds judged."""
    part = judgement_part(evidence)
    assert part is not None
    assert part.text.endswith("Round 2 was rolled back.")
    lost = "-0.0800 [-0.1500, +0.0100]"
    assert part.tables[0].rows == (
        ("2", "mAP", "-0.3000 [-0.4000, -0.2000], unreliable: 12 videos", "-0.02", "inferior"),
        ("2", "AP of <b>jump</b> & $run$", f"{lost}, unreliable: 12 videos", "-0.1", "undecided"),
    )
    plain = [entry for entry in evidence.summary["rounds"] if entry["standing"]]
    assert judgement_part(replace(evidence, summary={**evidence.summary, "rounds": plain})) is None


def test_no_round_yet(evidence: Evidence) -> None:
    assert "No block is gone" in answer_text(
        depths_info({"teacher": evidence.summary["teacher"], "rounds": []}), None, "mAP@0.5"
    )


def test_warnings(evidence: Evidence, make_detections: Callable[[Annotations, float, int], pa.Table]) -> None:
    lines = warnings_info(evidence)
    assert [line for line in lines if "left out: 1" in line]
    assert "Round 2, inferior on selection videos: mAP less the teacher's -0.3." in lines
    few = dict(evidence.summary["rounds"][0]["interval"], unreliable=True, videos=8)
    summary = {
        **evidence.summary,
        "stop_reason": None,
        "bit_exact": False,
        "rounds": [{**evidence.summary["rounds"][0], "interval": few, "tie": "blocks 1, 2 score alike"}],
    }
    environment = {**evidence.environment, "changes": [["cpu: a -> b"]]}
    told = "\n".join(warnings_info(replace(evidence, summary=summary, environment=environment)))
    for expected in ("not over", "cpu: a -> b", "Only 8 test videos", "Round 1: blocks 1, 2 score alike"):
        assert expected in told
    assert np.all([line.endswith(".") for line in told.splitlines()])
