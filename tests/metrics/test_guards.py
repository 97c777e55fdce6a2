"""Guards against the same analysis of data sets in which every video is copied as often as it was drawn."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pyarrow as pa
import pytest

from pbd_ray.data.annotations import DETECTION_SCHEMA, Annotations, Video
from pbd_ray.metrics.detad import diagnose, missed_instances
from pbd_ray.metrics.detad_rules import Bins, DetadRules
from pbd_ray.metrics.guards import Guard, class_loss_guards, false_negative_guards
from pbd_ray.metrics.mean_ap import match_detections, mean_average_precision, prepare_ground_truth

REPLICATES, CONFIDENCE = 25, 0.9
CLASSES = ("jump", "run", "rare")
RULES = DetadRules(
    tious=(0.5, 0.7),
    bins={
        "length": Bins(edges=(0, 3, 6, 100), labels=("S", "M", "L")),
        "num-instances": Bins(edges=(-1, 1, 9), labels=("one", "more")),
    },
    min_precision=0.0,  # then what is missed in a video does not depend on other videos
)


@pytest.fixture(scope="module")
def annotations() -> Annotations:
    """Eight videos; one alone holds the class 'rare'; none an instance of length L."""
    rng, made = np.random.default_rng(4), []
    for index in range(8):
        starts = np.sort(rng.uniform(0, 70, size=4))
        labels = rng.integers(0, 2, size=4)
        made.append(
            Video(
                id=f"v{index}",
                path=f"v{index}.mp4",
                subset="selection",
                duration_seconds=80.0,
                fps=10.0,
                frames=800,
                segments_seconds=np.stack([starts, starts + rng.uniform(2, 6, size=4)], axis=1),
                labels=np.where([index == 3, False, False, False], 2, labels).astype(np.int32),
            )
        )
    return Annotations(CLASSES, tuple(made))


def detected(annotations: Annotations, missing: float, seed: int) -> pa.Table:
    """Detections that are exact, off by a quarter of their length, or far away, and two strays a video."""
    truth, rng = annotations.ground_truth(), np.random.default_rng(seed)
    start, end = (truth[name].to_numpy() for name in ("start", "end"))
    shift = rng.choice([0.0, 0.25, 9.0], len(start), p=[0.9 - missing, 0.1, missing]) * (end - start)
    stray = pa.table(
        {
            "video": [video.id for video in annotations.videos for _ in range(2)],
            "start": rng.uniform(0, 70, 2 * len(annotations.videos)),
            "label": rng.integers(0, 3, 2 * len(annotations.videos)).astype(np.int32),
        }
    )
    columns = {
        "video": truth["video"].to_pylist() + stray["video"].to_pylist(),
        "start": np.concatenate((start + shift, stray["start"])),
        "end": np.concatenate((end + shift, stray["start"].to_numpy() + 4)),
        "label": np.concatenate((truth["label"], stray["label"])),
        "score": rng.random(len(start) + len(stray)),
    }
    return pa.table(columns).select(DETECTION_SCHEMA.names).cast(DETECTION_SCHEMA)


def copied(annotations: Annotations, detections: pa.Table, drawn: list[int]) -> tuple[Annotations, pa.Table]:
    videos, tables = [], []
    for place, index in enumerate(drawn):
        video = annotations.videos[index]
        videos.append(replace(video, id=f"{place}"))
        mine = detections.filter(pa.compute.equal(detections["video"], video.id))
        tables.append(mine.set_column(0, "video", pa.array([f"{place}"] * len(mine), pa.string())))
    return replace(annotations, videos=tuple(videos)), pa.concat_tables(tables)


def bca(value: float, drawn: list[float], left_out: list[float]) -> tuple[float, float]:
    normal, out = NormalDist(), np.array(left_out)
    share = np.mean([(one < value) + 0.5 * (one == value) for one in drawn])
    bias = normal.inv_cdf(min(max(share, 0.5 / len(drawn)), 1 - 0.5 / len(drawn)))
    pull = out.mean() - out
    spread = (pull**2).sum()
    acceleration = (pull**3).sum() / (6 * spread**1.5) if spread else 0.0
    z = [bias + normal.inv_cdf(level) for level in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)]
    levels = [normal.cdf(bias + one / (1 - acceleration * one)) for one in z]
    low, high = np.quantile(drawn, levels)
    return float(low), float(high)


def check(guards: tuple[Guard, ...], annotations: Annotations, measure) -> None:
    """Args: measure: (annotations, student, teacher) copied alike -> {name: difference}."""
    draws = np.random.default_rng(6).integers(8, size=(REPLICATES, 8)).tolist()
    left = [[index for index in range(8) if index != out] for out in range(8)]
    whole, replicates, without = (
        [measure(drawn) for drawn in some] for some in ([list(range(8))], draws, left)
    )
    assert [guard.name for guard in guards] == list(whole[0])
    for guard in guards:
        drawn = [found[guard.name] for found in replicates if guard.name in found]
        out = [found[guard.name] for found in without if guard.name in found]
        low, high = bca(whole[0][guard.name], drawn, out)
        assert guard.left_out == REPLICATES - len(drawn)
        assert (guard.difference, guard.low, guard.high) == pytest.approx(
            (whole[0][guard.name], low, high), abs=1e-11
        )


def test_class_loss(annotations: Annotations) -> None:
    student, teacher = detected(annotations, 0.4, 1), detected(annotations, 0.1, 2)
    prepared = prepare_ground_truth(annotations.ground_truth(), 3)
    arms = [match_detections(prepared, table, (0.5, 0.7)) for table in (student, teacher)]
    rng = np.random.default_rng(6)
    guards = class_loss_guards(*arms, "average", CLASSES, 0.1, rng, REPLICATES, CONFIDENCE)

    def measure(drawn: list[int]) -> dict[str, float]:
        aps = []
        for table in (student, teacher):
            videos, rows = copied(annotations, table, drawn)
            aps.append(mean_average_precision(videos.ground_truth(), rows, (0.5, 0.7), 3).ap.mean(axis=0))
        return {CLASSES[label]: aps[0][label] - aps[1][label] for label in np.flatnonzero(~np.isnan(aps[0]))}

    check(guards, annotations, measure)
    assert {guard.what for guard in guards} == {"class_loss"}
    assert guards[2].left_out > 0


def test_false_negative_rise(annotations: Annotations) -> None:
    student, teacher = detected(annotations, 0.4, 1), detected(annotations, 0.1, 2)
    arms = [missed_instances(annotations, table, RULES) for table in (student, teacher)]
    rng = np.random.default_rng(6)
    guards = false_negative_guards(*arms, 0.1, rng, REPLICATES, CONFIDENCE)

    def measure(drawn: list[int]) -> dict[str, float]:
        rates = []
        for table in (student, teacher):
            found = diagnose(*copied(annotations, table, drawn), RULES).false_negative_rate
            rates.append(
                {f"{what} {name}": rate for what, row in found.items() for name, rate in row.items()}
            )
        # BCa counts the replicates that equal the whole: a difference of two quotients must not hide that.
        return {name: round(rate - rates[1][name], 12) for name, rate in rates[0].items()}

    check(guards, annotations, measure)
    assert [guard.name for guard in guards] == [
        "length S",
        "length M",
        "num-instances one",
        "num-instances more",
    ]
    assert max(guard.difference for guard in guards) > 0.1


@pytest.mark.parametrize(("limit", "verdict"), [(0.5, "inferior"), (0.8, "undecided"), (0.96, "holds")])
def test_verdicts(annotations: Annotations, limit: float, verdict: str) -> None:
    """The class 'jump' loses 0.62 to 0.93 of its AP; 0.59 to 0.86 more of all instances are missed."""
    student, teacher = detected(annotations, 0.7, 1), detected(annotations, 0.0, 2)
    prepared = prepare_ground_truth(annotations.ground_truth(), 3)
    arms = [match_detections(prepared, table, (0.5,)) for table in (student, teacher)]
    lost = class_loss_guards(*arms, 0.5, CLASSES, limit, np.random.default_rng(0), 200, 0.95)[0]
    rules = RULES.model_copy(update={"bins": {"length": Bins(edges=(0, 100), labels=("all",))}})
    misses = [missed_instances(annotations, table, rules) for table in (student, teacher)]
    (missed,) = false_negative_guards(*misses, limit, np.random.default_rng(0), 200, 0.95)
    assert (lost.name, lost.what, lost.limit, lost.verdict) == ("jump", "class_loss", limit, verdict)
    assert (missed.name, missed.what) == ("length all", "false_negative_rise")
    assert (missed.limit, missed.verdict) == (limit, verdict)
    assert lost.low < lost.difference < lost.high < 0 < missed.low < missed.difference < missed.high


def test_an_equal_student_holds(annotations: Annotations) -> None:
    found = detected(annotations, 0.3, 1)
    matches = match_detections(prepare_ground_truth(annotations.ground_truth(), 3), found, (0.5,))
    misses = missed_instances(annotations, found, RULES)
    guards = (
        *class_loss_guards(matches, matches, 0.5, CLASSES, 1e-9, np.random.default_rng(0), 50, 0.95),
        *false_negative_guards(misses, misses, 1e-9, np.random.default_rng(0), 50, 0.95),
    )
    assert {(guard.difference, guard.low, guard.high, guard.verdict) for guard in guards} == {
        (0.0, 0.0, 0.0, "holds")
    }
