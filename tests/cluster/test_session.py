"""Whether a cluster can grow is decided on the autoscaler's report, not on its absence."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from pbd_ray.cluster import session
from pbd_ray.config import Execution

HEAD = {"NodeID": "ab12", "Alive": True, "Resources": {"CPU": 1.0}}
LARGE = {"NodeID": "cd34", "Alive": True, "Resources": {"CPU": 3.0}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A cluster of one small node, to which a large one comes when it is asked for; what was asked."""
    requests: list[Any] = []
    monkeypatch.setattr(session.ray, "nodes", lambda: [HEAD, LARGE] if any(requests) else [HEAD])
    monkeypatch.setattr(session, "request_resources", lambda bundles: requests.append(bundles))
    monkeypatch.setattr(session.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(session, "asking", lambda need: contextlib.nullcontext())
    monkeypatch.setattr(session, "refused", lambda need, since: False)
    monkeypatch.setattr(session, "most_workers", lambda need: None)
    return requests


def reports(monkeypatch: pytest.MonkeyPatch, *types: set[str]) -> None:
    """The autoscaler's reports, one a look; the last one stays."""
    left = list(types)
    monkeypatch.setattr(session, "_node_types", lambda: left.pop(0) if len(left) > 1 else left[0])


def test_a_head_without_a_report_yet_may_still_grow(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    reports(monkeypatch, set(), set(), set(), {"head"})
    session.require_resources(Execution(cpus_per_worker=3), print, 1)
    assert asked == [[{"CPU": 3.0}], []]


def test_a_cluster_without_node_types_is_refused(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    reports(monkeypatch, set(), {"node_ab12"})
    with pytest.raises(session.ResourcesError, match=r"asks for 3 CPU a worker .* at most 1 CPU and 0 GPU"):
        session.require_resources(Execution(cpus_per_worker=3), print, 1)
    assert asked == []


def test_no_report_at_all_is_refused_in_time(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    reports(monkeypatch, set())
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(session.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(session.ResourcesError, match="at most 1 CPU"):
        session.require_resources(Execution(cpus_per_worker=3), print, 1)
    assert next(clock) < 100


def test_a_gang_that_the_nodes_do_not_hold(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    reports(monkeypatch, {"node_ab12"})
    with pytest.raises(session.ResourcesError) as error:
        session.require_resources(Execution(train_workers=3), print, 3)
    assert str(error.value) == (
        "execution asks for 3 workers at once (train_workers), 1 CPU a worker "
        "(cpus_per_worker, gpus_per_worker) but the nodes of the cluster hold 1"
    )


def test_a_gang_waits_for_the_nodes_that_the_autoscaler_brings(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    reports(monkeypatch, {"head", "large"})
    session.require_resources(Execution(train_workers=4), print, 4)
    assert asked == [[{"CPU": 1.0}] * 4, []]


def test_a_gang_beyond_what_the_autoscaler_may_bring(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    reports(monkeypatch, {"head", "large"})
    monkeypatch.setattr(session, "most_workers", lambda need: 4)
    with pytest.raises(
        session.ResourcesError, match=r"5 workers at once .* but its autoscaler brings 4 at most"
    ):
        session.require_resources(Execution(train_workers=5), print, 5)
    assert asked == []


def test_nodes_that_do_not_come_in_time(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    reports(monkeypatch, {"head", "large"})
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(session.time, "monotonic", lambda: float(next(clock)))
    lines: list[str] = []
    with pytest.raises(session.ResourcesError) as error:
        session.require_resources(Execution(resource_wait_seconds=100, train_workers=9), lines.append, 9)
    assert str(error.value) == "4 of 9 workers of 1 CPU came within execution.resource_wait_seconds=100"
    assert lines[0] == "waiting for 9 workers of 1 CPU, room for 4 is there"
    assert asked[-1] == []
