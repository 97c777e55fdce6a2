"""The page as text: whole, offline, escaped, and it says what the run's files say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pbd_ray.metrics.detad_rules import ACTIVITYNET, THUMOS14
from pbd_ray.report.evidence import Evidence
from pbd_ray.report.page import depth_map_info, report_page

Parse = Callable[[str], Any]


@pytest.fixture(scope="module")
def text(evidence: Evidence) -> str:
    return report_page(evidence)


def test_nothing_is_loaded(text: str, parse: Parse) -> None:
    page = parse(text)
    assert not page.all("script")
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    for tag in ("img", "iframe", "object"):
        assert not page.all(tag)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,"))


def test_what_users_named_is_escaped(text: str, parse: Parse) -> None:
    """Classes, videos, reasons and the experiment are called like markup."""
    page = parse(text)
    assert not page.all("i")
    assert not page.all("b")
    assert not page.all("run")
    texts = " ".join(page.texts)
    for shown in ("a <run>", "<b>jump</b> & $run$", "bad <i>", "bad.mp4: not a video & empty"):
        assert shown in texts


def test_identifiers_are_unique(text: str, parse: Parse) -> None:
    found = Counter(attributes["id"] for _, attributes in parse(text).elements if "id" in attributes)
    assert [name for name, count in found.items() if count > 1] == []


def test_every_figure_has_words(text: str, parse: Parse) -> None:
    figures = parse(text).all("svg")
    assert len(figures) == 3 + 1 + 6 + 3 + 6  # costs, classes, DETAD, candidates, learning rates
    for attributes in figures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 40


def test_every_variable_is_defined_in_both_themes(text: str) -> None:
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", text))
    assert used <= set(re.findall(r"--([a-z0-9-]+):", light))
    themed = {name for name in used if not name.startswith("outcome-")}
    assert themed <= set(re.findall(r"--([a-z0-9-]+):", dark.split("@media print")[0]))
    printed = style.split("@media print")[1]
    assert themed <= set(re.findall(r"--([a-z0-9-]+):", printed))


def test_the_answer_is_the_last_that_stands(text: str, parse: Parse) -> None:
    texts = parse(text).texts
    assert "4 blocks became 2, with 33% fewer multiplications" in texts
    assert [line for line in texts if line.startswith("Undecided: 2 of 4 blocks are gone (2, 3).")]


def test_depth_map(evidence: Evidence) -> None:
    found = depth_map_info(evidence.summary)
    assert found.blocks == (0, 1, 2, 3)
    states = {row.label: [cell.state for cell in row.cells] for row in found.rows}
    assert states == {
        "teacher": ["kept", "kept", "kept", "kept"],
        "1": ["kept", "kept", "drops", "kept"],
        "2": ["kept", "back", "gone", "kept"],
        "3": ["kept", "kept", "gone", "drops"],
    }


def test_equal_evidence_gives_an_equal_page(evidence: Evidence, text: str) -> None:
    assert report_page(evidence, THUMOS14) == text
    assert report_page(evidence, ACTIVITYNET) != text


def test_the_papers_protocol(evidence: Evidence, parse: Parse) -> None:
    """Test videos choose: the page must not say that they do not."""
    experiment = evidence.recipe.experiment.model_copy(update={"paper_protocol": True})
    recipe = evidence.recipe.model_copy(update={"experiment": experiment})
    told = " ".join(parse(report_page(replace(evidence, recipe=recipe))).texts)
    assert "chosen by mAP on the test videos; the ring" in told
    assert "selection videos, which neither train nor test" not in told


def test_a_runner_up(text: str, parse: Parse) -> None:
    """Round 3 went on the scores of round 2: the block that was rolled back is named and marked."""
    told = " ".join(parse(text).texts)
    assert "Rolled back before, by the same scores: 1; distances are from 1." in told
    assert "rolled back in round 2" in told


def test_learning_rates_that_did_not_end(evidence: Evidence, parse: Parse) -> None:
    runs = {"0.1": {"epochs": 0, "seconds": 0.0, "diverged": "loss nan at step 0"}}
    held = {"cpus_per_worker": 1.0, "gpus_per_worker": 0.0, "train_workers": 1}
    stages = {"align": {"seconds": 1.0, "resumed": False, "learning_rates": runs, **held}}
    curves = evidence.rounds[0].curves
    assert curves is not None
    halved = curves.set_column(
        curves.column_names.index("outcome"), "outcome", [["halved"] * curves.num_rows]
    )
    rounds = [replace(evidence.rounds[0], curves=halved, measured={"stages": stages}), *evidence.rounds[1:]]
    page = parse(report_page(replace(evidence, rounds=rounds)))
    assert "Round 1, 0.1: loss nan at step 0." in " ".join(page.texts)
    assert [one for one in page.all("svg") if "0.001 (halved)" in one["aria-label"]]


def test_every_round_rolled_back(evidence: Evidence, parse: Parse) -> None:
    back = [evidence.summary["rounds"][1]]
    reason = "removal of block 1 inferior: the student no longer recovers"
    summary = {**evidence.summary, "rounds": back, "stop_reason": reason}
    told = " ".join(parse(report_page(replace(evidence, summary=summary, rounds=evidence.rounds[1:2]))).texts)
    assert "No block is gone." in told
    assert f"The run ended: {reason}." in told
    assert "yet" not in told.split("Recipe")[0]


def test_before_the_first_round(evidence: Evidence, parse: Parse) -> None:
    """From the teacher's commit on there is a page."""
    summary = {**evidence.summary, "rounds": [], "stop_reason": None}
    texts = parse(report_page(replace(evidence, summary=summary, rounds=()))).texts
    assert "The teacher, 4 blocks" in texts
    assert [line for line in texts if "The run is not over" in line]


def test_without_scores_and_training(evidence: Evidence, parse: Parse) -> None:
    """Blocks that the recipe named, no fine-tuning."""
    changes = {"criterion": "given", "candidates": {}, "undropped_score": None, "lr": None, "epoch": 0}
    rounds = [{**entry, **changes} for entry in evidence.summary["rounds"]]
    depths = [replace(depth, curves=None, measured={}) for depth in evidence.rounds]
    texts = parse(
        report_page(replace(evidence, summary={**evidence.summary, "rounds": rounds}, rounds=depths))
    ).texts
    assert [line for line in texts if "nothing was scored" in line]
    assert "Why these blocks" not in texts
    assert "How the students were fine-tuned" not in texts
