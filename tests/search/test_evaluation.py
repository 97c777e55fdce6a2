from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.config import EvaluationConfig, GuardrailsConfig
from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations
from pbd_ray.metrics.detad import diagnose
from pbd_ray.metrics.mean_ap import mean_average_precision
from pbd_ray.search import records
from pbd_ray.search.evaluation import detections_of, evaluate, guards_between, interval_between
from pbd_ray.search.state import Cost, Model

RULES = EvaluationConfig(bootstrap_replicates=200)
MODEL = Model((0, 2), {})
COST = Cost(macs=10, block_macs=7, params=3)


@pytest.fixture
def data(make_videos) -> Annotations:
    return make_videos("test", 25, 5)


def detected(data: Annotations, missing: float, seed: int = 0) -> pa.Table:
    """Exact detections but for a share of instances that are far off."""
    truth = data.ground_truth()
    rng = np.random.default_rng(seed)
    shift = np.where(rng.random(truth.num_rows) < missing, 100.0, 0.0)
    columns = {
        "video": truth["video"],
        "start": truth["start"].to_numpy() + shift,
        "end": truth["end"].to_numpy() + shift,
        "label": truth["label"],
        "score": rng.random(truth.num_rows),
    }
    return pa.table(columns).cast(DETECTION_SCHEMA)


def with_candidates(detections: pa.Table) -> pa.Table:
    def said_of(block: int) -> pa.Table:
        column = pa.array([block] * detections.num_rows, pa.int32())
        return detections.append_column("candidate", column)

    return pa.concat_tables([said_of(-1), said_of(3)])


def test_candidates_do_not_count(data: Annotations) -> None:
    plain = detected(data, 0.2)
    assert detections_of(with_candidates(plain)).equals(plain)
    assert detections_of(plain).equals(plain)


@pytest.mark.parametrize("headline", [0.5, 0.55, "average"])
def test_evaluation(data: Annotations, headline: float | str) -> None:
    rules = RULES.model_copy(update={"headline_tiou": headline})
    rows = detected(data, 0.3)
    found = evaluate(data, with_candidates(rows), None, rules, 0, MODEL, COST)
    expected = mean_average_precision(data.ground_truth(), rows, rules.tious, 2)
    assert found.map == expected.map
    assert found.average_map == expected.average_map
    if headline == "average":
        assert found.headline_map == expected.average_map
    else:
        at = mean_average_precision(data.ground_truth(), rows, [float(headline)], 2)
        assert found.headline_map == at.average_map
    assert (found.macs, found.block_macs, found.params) == (10, 7, 3)
    assert (found.kept_blocks, found.interval) == ((0, 2), None)
    assert records.evaluation_from_json(records.evaluation_to_json(found)) == found


def test_interval_is_paired_and_repeatable(data: Annotations) -> None:
    student, teacher = detected(data, 0.3), detected(data, 0.3)
    same = interval_between(data, student, teacher, RULES, 0.0, 1)
    assert (same.difference, same.low, same.high, same.verdict) == (0.0, 0.0, 0.0, "holds")
    worse = detected(data, 0.6)
    first = interval_between(data, worse, teacher, RULES, 0.01, 1)
    assert first == interval_between(data, worse, teacher, RULES, 0.01, 1)
    assert first != interval_between(data, worse, teacher, RULES, 0.01, 2)
    assert first.low < first.difference < first.high < 0
    assert first.verdict == "inferior"
    assert (first.videos, first.unreliable, first.margin) == (25, False, 0.01)
    assert first.dropped_classes == 0
    assert interval_between(data, worse, teacher, RULES, 0.9, 1).verdict == "holds"
    middle = interval_between(data, worse, teacher, RULES, -first.difference, 1)
    assert middle.verdict == "undecided"


def test_evaluation_names_its_margin(data: Annotations) -> None:
    rows = detected(data, 0.3)
    found = evaluate(data, rows, detected(data, 0.1), RULES, 0, MODEL, COST)
    assert found.interval is not None
    assert found.interval.margin == RULES.noninferiority_margin
    assert records.evaluation_from_json(records.evaluation_to_json(found)) == found


def test_no_detections_at_all(data: Annotations) -> None:
    nothing = detected(data, 0.3).slice(0, 0)
    found = evaluate(data, nothing, nothing, RULES, 0, MODEL, COST)
    assert found.average_map == 0.0
    assert found.interval is not None
    assert found.interval.difference == 0.0


def test_guards(data: Annotations) -> None:
    """Differences are those of the two models scored apart; only what is asked for is computed."""
    student, teacher = detected(data, 0.6), detected(data, 0.2)
    rails = GuardrailsConfig(max_class_loss=0.1, max_false_negative_rise=0.2)
    guards = guards_between(data, with_candidates(student), teacher, RULES, rails, 1)
    differences = {(guard.what, guard.name): guard.difference for guard in guards}
    aps = [mean_average_precision(data.ground_truth(), rows, [0.5], 2).ap[0] for rows in (student, teacher)]
    rates = [diagnose(data, rows).false_negative_rate for rows in (student, teacher)]
    expected = {
        ("class_loss", name): aps[0][label] - aps[1][label] for label, name in enumerate(data.classes)
    }
    expected |= {
        ("false_negative_rise", f"{what} {name}"): rate - rates[1][what][name]
        for what, bucket in rates[0].items()
        for name, rate in bucket.items()
    }
    assert differences == pytest.approx(expected, abs=1e-12)
    assert [guard.limit for guard in guards] == [0.1] * 2 + [0.2] * (len(guards) - 2)
    for name, kind in (("max_class_loss", "class_loss"), ("max_false_negative_rise", "false_negative_rise")):
        alone = rails.model_copy(update={name: None})
        rest = guards_between(data, student, teacher, RULES, alone, 1)
        assert rest == tuple(guard for guard in guards if guard.what != kind)
    assert guards_between(data, student, teacher, RULES, GuardrailsConfig(), 1) == ()
    wide = GuardrailsConfig(max_false_negative_rise=0.2, detad="activitynet")
    assert "length S" not in {guard.name for guard in guards_between(data, student, teacher, RULES, wide, 1)}
